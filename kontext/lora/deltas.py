"""What an adapter changes: one small formula per kind of adapter, all with the same few methods.

W is a weight of the base, (out, in) or (out,); dW the change at strength 1. Factors keep the dtype of their
file; arithmetic is float32.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Change(Protocol):
    """A change of one tensor, or of some of its rows."""

    needs_base: bool  # whether dW depends on W

    def rows(self, start: int, stop: int) -> "Change | None":
        """The change of some rows alone, from the same rows of W; None where it takes others too."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of dW."""

    def dense(self, base: Tensor) -> Tensor:
        """dW, float32, on base's device. base: W, float32; only read when `needs_base`."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """LoRA: dW = scale * up @ down, with down (r, in) and up (out, r)."""

    down: Tensor
    up: Tensor
    scale: float
    needs_base = False

    def rows(self, start: int, stop: int) -> "LowRank":
        return replace(self, up=self.up[start:stop])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def dense(self, base: Tensor) -> Tensor:
        return self.scale * _float(self.up, base) @ _float(self.down, base)

    def add_to(self, base: Tensor, strength: float) -> None:
        """base += strength * dW, without a second tensor of that size."""
        base.addmm_(_float(self.up, base), _float(self.down, base), alpha=strength * self.scale)

    def add_product(self, x: Tensor, strength: float, out: Tensor) -> None:
        """out += strength * dW x for x (..., in) and out (..., out), the channels of one tensor or some of a wider one."""
        hidden = F.linear(x.flatten(0, -2), self.down.to(x))
        out.view(-1, out.shape[-1]).addmm_(hidden, self.up.to(x).t(), alpha=strength * self.scale)


@dataclass(frozen=True, eq=False)
class Hadamard:
    """LoHa: dW = scale * (w1_a @ w1_b) o (w2_a @ w2_b) (Hyeon-Woo et al. 2022, arXiv:2108.06098)."""

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    scale: float
    needs_base = False

    def rows(self, start: int, stop: int) -> "Hadamard":
        return replace(self, w1_a=self.w1_a[start:stop], w2_a=self.w2_a[start:stop])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w1_a.shape[0], self.w1_b.shape[1]

    def dense(self, base: Tensor) -> Tensor:
        first = _float(self.w1_a, base) @ _float(self.w1_b, base)
        return first.mul_(_float(self.w2_a, base) @ _float(self.w2_b, base)).mul_(self.scale)


@dataclass(frozen=True, eq=False)
class Kronecker:
    """LoKr: dW = scale * kron(w1, w2) (Edalati et al. 2022, arXiv:2212.10650). rank: of w2, if it was a product."""

    w1: Tensor
    w2: Tensor
    scale: float
    rank: int | None = None
    needs_base = False

    def rows(self, start: int, stop: int) -> None:
        """Rows of a product of blocks begin and end within blocks."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w1.shape[0] * self.w2.shape[0], self.w1.shape[1] * self.w2.shape[1]

    def dense(self, base: Tensor) -> Tensor:
        return torch.kron(self.scale * _float(self.w1, base), _float(self.w2, base))

    def apply(self, x: Tensor) -> Tensor:
        """dW x, in x's dtype: w1 X w2^T with x laid out as a matrix X."""
        x = x.unflatten(-1, (self.w1.shape[1], self.w2.shape[1]))
        return (self.scale * self.w1.to(x) @ F.linear(x, self.w2.to(x))).flatten(-2)


@dataclass(frozen=True, eq=False)
class Difference:
    """A difference in full: dW itself."""

    values: Tensor
    needs_base = False

    def rows(self, start: int, stop: int) -> "Difference":
        return Difference(self.values[start:stop])

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def dense(self, base: Tensor) -> Tensor:
        return _float(self.values, base)


@dataclass(frozen=True, eq=False)
class Replacement:
    """A new value in full: dW = value - W."""

    values: Tensor
    needs_base = True

    def rows(self, start: int, stop: int) -> "Replacement":
        return Replacement(self.values[start:stop])

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def dense(self, base: Tensor) -> Tensor:
        return _float(self.values, base) - base


@dataclass(frozen=True, eq=False)
class Decomposed:
    """DoRA: W + dW = m V / |V| with V = W + inner (Liu et al. 2024, arXiv:2402.09353).

    magnitude m is (out, 1) with norms over each output's row, or (1, in) with norms over each input's column.
    """

    inner: Change
    magnitude: Tensor
    needs_base = True

    def rows(self, start: int, stop: int) -> "Decomposed | None":
        """None for norms over columns."""
        inner = self.inner.rows(start, stop) if self.magnitude.shape[1] == 1 else None
        return Decomposed(inner, self.magnitude[start:stop]) if inner else None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    def dense(self, base: Tensor) -> Tensor:
        direction = base + self.inner.dense(base)
        axis = 1 if self.magnitude.shape[1] == 1 else 0
        norm = torch.linalg.vector_norm(direction, dim=axis, keepdim=True)
        return direction.mul_(_float(self.magnitude, base) / norm).sub_(base)


@dataclass(frozen=True, eq=False)
class Swapped:
    """A change whose rows are stored with their halves swapped: diffusers' final modulation."""

    inner: Change

    def rows(self, start: int, stop: int) -> None:
        """The same rows of W are not those that it changes."""

    @property
    def needs_base(self) -> bool:
        return self.inner.needs_base

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    def dense(self, base: Tensor) -> Tensor:
        return swap_halves(self.inner.dense(swap_halves(base)))


@dataclass(frozen=True)
class Target:
    """Rows start to stop of the tensor `tensor` (BFL's name) of the transformer."""

    tensor: str
    start: int
    stop: int


@dataclass(frozen=True)
class Delta:
    """A change and the rows it is for. `key` is the stem of its keys in the file, for messages."""

    target: Target
    change: Change
    key: str

    def within(self, start: int, stop: int) -> "Delta | None":
        """What it changes in rows start to stop of its tensor, counted from `start`; None if nothing.

        For changes that can be had by rows.
        """
        first, last = max(start, self.target.start), min(stop, self.target.stop)
        if first >= last:
            return None
        change = self.change.rows(first - self.target.start, last - self.target.start)
        assert change is not None
        return Delta(Target(self.target.tensor, first - start, last - start), change, self.key)

    def add_to(self, merged: Tensor, base: Tensor, strength: float) -> None:
        """merged += strength * dW within the target's rows; both (out, ...) float32, base is left alone."""
        rows = slice(self.target.start, self.target.stop)
        if isinstance(self.change, LowRank):
            self.change.add_to(merged[rows], strength)
        else:
            merged[rows].add_(self.change.dense(base[rows]), alpha=strength)


def swap_halves(x: Tensor) -> Tensor:
    """(2n, ...): the second n rows first. Its own inverse."""
    return x.roll(x.shape[0] // 2, 0)


def _float(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.device, torch.float32)
