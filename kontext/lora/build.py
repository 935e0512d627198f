"""From the tensors of one module in an adapter file to the change they describe."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kontext.lora.deltas import (
    Change,
    Decomposed,
    Difference,
    Hadamard,
    Kronecker,
    LowRank,
    Replacement,
    Swapped,
    swap_halves,
)

_HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")

Parts = Mapping[str, Tensor]
Scale = Callable[[int | None], float]


class Misfit(ValueError):
    """Tensors of one module that contradict each other; the message names part and shape."""


@dataclass(frozen=True)
class Scaling:
    """Alphas that stand in a file's metadata (PEFT) instead of beside its tensors. Default: scale 1."""

    alpha: float | None = None
    rank: int | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)
    sqrt_rank: bool = False

    def scale(self, stem: str, rank: int | None) -> float:
        """alpha / r of a module, or alpha / sqrt(r) when the file says so (rsLoRA).

        rank: as the tensors show it; None when they do not, and the metadata's stands in.
        """
        alpha = next((a for p, a in self.patterns.items() if re.search(rf"(^|\.)({p})$", stem)), self.alpha)
        rank = rank or self.rank
        if alpha is None or rank is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.sqrt_rank else rank)


@dataclass(frozen=True)
class Built:
    """What the parts of one module change, and which of them were understood."""

    weight: Change | None
    bias: Change | None
    used: frozenset[str]


def scaling_from(settings: Mapping[str, object], prefix: str = "") -> Scaling:
    """The `Scaling` in PEFT's own settings, as `adapter_config.json` or diffusers' metadata hold them."""
    alpha = settings.get(f"{prefix}lora_alpha", settings.get(f"{prefix}alpha"))
    rank = settings.get(f"{prefix}r")
    patterns = settings.get(f"{prefix}alpha_pattern")
    return Scaling(
        alpha=float(alpha) if isinstance(alpha, int | float) else None,
        rank=rank if isinstance(rank, int) else None,
        patterns=patterns if isinstance(patterns, dict) else {},
        sqrt_rank=bool(settings.get(f"{prefix}use_rslora", False)),
    )


def build(parts: Parts, stem: str, scaling: Scaling) -> Built:
    """The change of weight and bias that `parts` (part name -> tensor) describe.

    Raises Misfit when shapes contradict each other or a value is not finite.
    """
    for part, tensor in parts.items():
        if not torch.isfinite(tensor.float()).all():
            raise Misfit(f"{part} holds values that are not finite")

    def scale(rank: int | None) -> float:
        if "alpha" in parts:
            return parts["alpha"].item() / rank if rank else 1.0
        return scaling.scale(stem, rank)

    weight, used = _weight(parts, scale)
    bias, used_bias = _bias(parts, scale)
    used |= used_bias
    if weight and "magnitude" in parts:
        weight, used = _decomposed(weight, parts["magnitude"]), used | {"magnitude"}
    return Built(weight, bias, frozenset(used | ({"alpha"} if used else set())))


def swap_rows(change: Change) -> Change:
    """The same change for a tensor whose row halves lie the other way round."""
    if isinstance(change, LowRank):
        return LowRank(change.down, swap_halves(change.up), change.scale)
    if isinstance(change, Difference):
        return Difference(swap_halves(change.values))
    if isinstance(change, Decomposed):
        by_row = change.magnitude.shape[1] == 1  # lengths of columns do not mind the order of rows
        magnitude = swap_halves(change.magnitude) if by_row else change.magnitude
        return Decomposed(swap_rows(change.inner), magnitude)
    return Swapped(change)


def pad_inputs(change: Change, inputs: int) -> Change:
    """A low-rank change that reads only the first inputs of a wider linear, as one that reads all of them."""
    if not isinstance(change, LowRank) or change.shape[1] >= inputs:
        return change
    missing = inputs - change.shape[1]
    return LowRank(torch.nn.functional.pad(change.down, (0, missing)), change.up, change.scale)


def _weight(parts: Parts, scale: Scale) -> tuple[Change | None, set[str]]:
    if {"down", "up"} <= parts.keys():
        return _low_rank(parts["down"], parts["up"], scale), {"down", "up"}
    if set(_HADAMARD) <= parts.keys():
        return _hadamard(parts, scale), set(_HADAMARD)
    if "set_weight" in parts:
        return Replacement(parts["set_weight"]), {"set_weight"}
    if "diff" in parts:
        return Difference(parts["diff"]), {"diff"}
    return _kronecker(parts, scale)


def _bias(parts: Parts, scale: Scale) -> tuple[Change | None, set[str]]:
    if "diff_b" in parts:
        return Difference(parts["diff_b"]), {"diff_b"}
    if "up_bias" in parts and "down" in parts:
        return Difference(parts["up_bias"] * scale(parts["down"].shape[0])), {"up_bias"}
    return None, set()


def _low_rank(down: Tensor, up: Tensor, scale: Scale) -> LowRank:
    _product(down=down, up=up)
    return LowRank(down, up, scale(down.shape[0]))


def _hadamard(parts: Parts, scale: Scale) -> Hadamard:
    w1_a, w1_b, w2_a, w2_b = (parts[name] for name in _HADAMARD)
    _product(hada_w1_b=w1_b, hada_w1_a=w1_a)
    _product(hada_w2_b=w2_b, hada_w2_a=w2_a)
    if w1_a.shape[0] != w2_a.shape[0] or w1_b.shape[1] != w2_b.shape[1]:
        raise Misfit("the two products of LoHa have different shapes")
    return Hadamard(w1_a, w1_b, w2_a, w2_b, scale(w1_b.shape[0]))


def _kronecker(parts: Parts, scale: Scale) -> tuple[Change | None, set[str]]:
    w1, rank1, used1 = _factor(parts, "lokr_w1")
    w2, rank2, used2 = _factor(parts, "lokr_w2")
    if w1 is None or w2 is None:
        return None, set()
    return Kronecker(w1, w2, scale(rank2 or rank1), rank2), used1 | used2


def _factor(parts: Parts, name: str) -> tuple[Tensor | None, int | None, set[str]]:
    """A Kronecker factor, its rank if it is stored as a product, and the parts it came from."""
    if name in parts:
        return parts[name], None, {name}
    a, b = f"{name}_a", f"{name}_b"
    if a not in parts or b not in parts:
        return None, None, set()
    _product(**{b: parts[b], a: parts[a]})
    return parts[a].float() @ parts[b].float(), parts[b].shape[0], {a, b}


def _decomposed(inner: Change, magnitude: Tensor) -> Decomposed:
    """Magnitudes are (out,) in PEFT, (out, 1) or (1, in) in LyCORIS."""
    if magnitude.ndim == 1:
        magnitude = magnitude[:, None]
    rows, columns = inner.shape
    if tuple(magnitude.shape) not in ((rows, 1), (1, columns)):
        raise Misfit(
            f"DoRA magnitudes of shape {tuple(magnitude.shape)} do not fit a change of {rows}x{columns}"
        )
    return Decomposed(inner, magnitude)


def _product(**matrices: Tensor) -> None:
    """Check right (r, in) and left (out, r), given in this order: two matrices with one rank."""
    (right_name, right), (left_name, left) = matrices.items()
    if right.ndim != 2 or left.ndim != 2 or left.shape[1] != right.shape[0]:
        raise Misfit(
            f"{right_name} {tuple(right.shape)} and {left_name} {tuple(left.shape)} "
            "are not (rank, in) and (out, rank)"
        )
