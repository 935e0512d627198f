"""LoRA to LoRA: several as one, at their full rank or a smaller one, and a LoRA out of two checkpoints."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kontext.checkpoints.source import Source
from kontext.errors import UserError
from kontext.lora.deltas import Decomposed, Delta, LowRank
from kontext.lora.fuse import fuse
from kontext.lora.merge import Plan, merge_weight
from kontext.lora.weights import stored_tensors

OVERSAMPLING = 16
POWER_STEPS = 4
EXACT_SIZE = 512  # of the smaller side: up to here a full decomposition is quick


@dataclass(frozen=True)
class Reduced:
    """A low-rank change, and the part of the original's squared norm that it keeps.

    magnitude (out, 1): of a DoRA, the lengths of the rows that it leads to.
    """

    change: LowRank
    kept: float
    magnitude: Tensor | None = None


def combine(
    plan: Plan, shapes: Mapping[str, tuple[int, ...]], rank: int | None
) -> Iterator[tuple[str, Reduced]]:
    """(BFL module, sum of its changes as one LoRA) for every weight of `plan`.

    rank: None keeps the sum exactly: ranks add up. shapes: by BFL tensor name.

    A DoRA comes out as it was. Raises UserError where that is not possible, for other changes that depend on the base,
    and for one in full without a rank.
    """
    for name, changes in plan.items():
        if not name.endswith(".weight"):
            continue
        module = name.removesuffix(".weight")
        if any(isinstance(delta.change, Decomposed) for delta, _ in changes):
            yield module, _as_it_was(changes, shapes[name][0], rank)
            continue
        _check(changes)
        deltas, strengths = [d for d, _ in changes], [s for _, s in changes]
        fused = fuse(deltas, shapes[name][0], strengths)
        if fused is None and rank is None:
            kind = type(deltas[0].change).__name__
            raise UserError(f"{deltas[0].key} is no plain LoRA ({kind}). Give --rank to turn it into one.")
        if fused is None:
            assert rank is not None
            yield module, reduce_dense(merge_weight(torch.zeros(shapes[name]), changes), rank)
        elif rank is None or rank >= fused.rank:
            yield module, Reduced(fused, 1.0)
        else:
            yield module, reduce_factors(fused, rank)


def reduce_factors(change: LowRank, rank: int) -> Reduced:
    """The best approximation of up @ down with a smaller rank, without ever multiplying them out.

    With up = Q1 R1 and down^T = Q2 R2, the singular values are those of the small R1 R2^T (Eckart-Young).
    """
    q1, r1 = torch.linalg.qr(change.up.float() * change.scale)
    q2, r2 = torch.linalg.qr(change.down.float().T)
    u, s, vt = torch.linalg.svd(r1 @ r2.T)
    return _truncate(q1 @ u, s, vt @ q2.T, s.square().sum(), rank)


def reduce_dense(change: Tensor, rank: int) -> Reduced:
    """The best approximation of a matrix (out, in) with a rank.

    Large matrices go through a randomised range finder (Halko et al. 2011, arXiv:0909.4061).
    """
    total = change.square().sum()
    if min(change.shape) <= max(EXACT_SIZE, 2 * rank):
        u, s, vt = torch.linalg.svd(change, full_matrices=False)
        return _truncate(u, s, vt, total, rank)
    with torch.random.fork_rng(devices=[change.device] if change.is_cuda else []):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(change, q=rank + OVERSAMPLING, niter=POWER_STEPS)
    return _truncate(u, s, v.T, total, rank)


def extract(
    base: Source, tuned: Source, modules: Sequence[str], rank: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, Reduced]]:
    """(BFL module, the difference tuned - base as a LoRA) for every module that differs.

    Raises UserError when the two checkpoints do not have the same shapes.
    """
    before, after = stored_tensors(base), stored_tensors(tuned)
    for module in modules:
        name = f"{module}.weight"
        if name not in before or name not in after:
            raise UserError(f"{name} is not in both {base.path} and {tuned.path}.")
        old, new = before[name].load(device), after[name].load(device)
        if old.shape != new.shape:
            raise UserError(
                f"{base.path} and {tuned.path} are models of different sizes: {name} is "
                f"{tuple(old.shape)} and {tuple(new.shape)}."
            )
        change = new.sub_(old)
        if change.any():
            yield module, reduce_dense(change, rank)


def _check(changes: Sequence[tuple[Delta, float]]) -> None:
    for delta, _ in changes:
        if delta.change.needs_base:
            raise UserError(
                f"{delta.key} depends on the weights it is for (a replacement). "
                "Merge it into a checkpoint with --dit instead."
            )


def _as_it_was(changes: Sequence[tuple[Delta, float]], rows: int, rank: int | None) -> Reduced:
    """The DoRA of one file, with its parts side by side: rows have lengths of their own, so that is exact."""
    deltas = [delta for delta, _ in changes]
    parts = [Delta(d.target, d.change.inner, d.key) for d in deltas if isinstance(d.change, Decomposed)]
    by_row = all(isinstance(d.change, Decomposed) and d.change.magnitude.shape[1] == 1 for d in deltas)
    covered = sum(delta.target.stop - delta.target.start for delta in deltas) == rows
    fused = fuse(parts, rows) if by_row and covered else None
    if fused is None or rank is not None or any(strength != 1 for _, strength in changes):
        raise UserError(
            f"{deltas[0].key} is a DoRA, which depends on the weights it is for. Alone, at strength 1, with lengths of "
            "rows for whole layers and without --rank it can be converted; else merge it into a checkpoint with --dit."
        )
    magnitude = torch.zeros(rows, 1)
    for delta in deltas:
        magnitude[delta.target.start : delta.target.stop] = delta.change.magnitude.float()
    return Reduced(fused, 1.0, magnitude)


def _truncate(u: Tensor, s: Tensor, vt: Tensor, total: Tensor, rank: int) -> Reduced:
    """u (out, k), s (k,), vt (k, in) to rank: the square root of s goes into each factor."""
    root = s[:rank].sqrt()
    kept = (s[:rank].square().sum() / total).clamp(max=1.0).item() if total > 0 else 1.0
    return Reduced(LowRank((root[:, None] * vt[:rank]).cpu(), (u[:, :rank] * root).cpu(), 1.0), kept)
