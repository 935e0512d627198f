"""Averages over the checkpoints of a run, made afterwards."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from kontext.checkpoints.source import Source, open_source
from kontext.errors import UserError

Decay = Callable[[int, int], float]


def by_step(paths: Sequence[Path]) -> list[Source]:
    """The files in the order of their training steps, which metadata (`ss_steps`) or else names tell.

    Raises UserError for a file that tells no step, and for two of the same step.
    """
    sources = [open_source(path, "LoRA") for path in paths]
    steps = {id(source): _step(source) for source in sources}
    if len(set(steps.values())) < len(sources):
        raise UserError(
            "Two of the files are of the same training step: give each checkpoint of the run once."
        )
    return sorted(sources, key=lambda source: steps[id(source)])


def constant(beta: float, beta2: float | None = None) -> Decay:
    """The share of the average that stays at each file: beta, going over to beta2 in a line."""
    last = beta if beta2 is None else beta2
    return lambda index, count: beta + (last - beta) * (index - 1) / max(1, count - 2)


def power(sigma_rel: float) -> Decay:
    """The power-function average of relative width sigma_rel (Karras et al. 2024, arXiv:2312.02696).

    Raises UserError for a width that no exponent gives.
    """
    gamma = _exponent(sigma_rel)
    return lambda index, count: (1 - 1 / (index + 1)) ** (gamma + 1)


def average(sources: Sequence[Source], decay: Decay) -> dict[str, Tensor]:
    """mean <- beta * mean + (1 - beta) * file, from the second file on, tensor by tensor in float32.

    decay(index, count): beta at file `index` (from 1) of `count`.

    Raises UserError when the files do not have the same tensors.
    """
    first = sources[0]
    tensors = {key: first.get(key).float().clone() for key in first.keys()}  # noqa: SIM118
    for index, source in enumerate(sources[1:], 1):
        _check_same(first, source)
        beta = decay(index, len(sources))
        for key, mean in tensors.items():
            mean.lerp_(source.get(key).float(), 1 - beta)
    return tensors


def _step(source: Source) -> int:
    text = source.metadata.get("ss_steps", "")
    match = re.fullmatch(r"\d+", text) or re.search(r"(\d+)$", Path(source.path).stem)
    if match is None:
        raise UserError(
            f"{source.path} does not tell its training step: neither its metadata nor its name does."
        )
    return int(match[0])


def _check_same(first: Source, other: Source) -> None:
    if set(first.keys()) != set(other.keys()) or any(first.shape(k) != other.shape(k) for k in first.keys()):  # noqa: SIM118
        raise UserError(f"{other.path} has other tensors than {first.path}: they are not of one run.")


def _exponent(sigma_rel: float) -> float:
    """gamma with sigma_rel = sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3))), which falls as gamma grows."""
    low, high = 0.0, 1e6
    if not _width(high) < sigma_rel < _width(low):
        raise UserError(f"--ema-sigma-rel must lie between 0 and {_width(low):.3f}, not {sigma_rel:g}.")
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _width(middle) > sigma_rel else (low, middle)
    return low


def _width(gamma: float) -> float:
    return ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5
