"""LoHa and LoKr in training: changes that are products of small matrices, with LyCORIS' names and first weights."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kontext.lora.build import Misfit
from kontext.lora.deltas import Change, Delta, Hadamard, Kronecker
from kontext.lora.linear import OTHER_KIND, AdapterLinear, draw_normal, draw_uniform

_SAME = 1e-4  # how much of a factor, by norm, may be lost when it is written as a product of this rank


class LohaLinear(AdapterLinear):
    """W0 x + (alpha/r) ((w1_a w1_b) o (w2_a w2_b)) x (Hyeon-Woo et al. 2022, arXiv:2108.06098).

    w*_a (out, r), w*_b (r, in). The elementwise product has no cheaper form than dW itself, which is made in each
    pass, and made again in the backward pass rather than kept.
    """

    dense = 3
    units = 2

    def create(self, device: torch.device | str) -> None:
        outputs, inputs = self.base.out_features, self.base.in_features
        self.hada_w1_a, self.hada_w2_a = (_zeros(outputs, self.rank, device) for _ in range(2))
        self.hada_w1_b, self.hada_w2_b = (_zeros(self.rank, inputs, device) for _ in range(2))

    @property
    def factors(self) -> tuple[nn.Parameter, ...]:
        return self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b

    def change(self, x: Tensor) -> Tensor:
        product = _HadamardProduct.apply(x, *(factor.to(x.dtype) for factor in self.factors))
        return self.dropped(product)

    def draw(self, generator: torch.Generator) -> None:
        draw_normal(self.hada_w1_a, 0.1, generator)
        draw_normal(self.hada_w1_b, 1.0, generator)
        draw_normal(self.hada_w2_b, 1.0, generator)

    @torch.no_grad()
    def load(self, deltas: Sequence[Delta]) -> None:
        change = _whole(deltas, self.base.out_features)
        if not isinstance(change, Hadamard):
            raise Misfit(OTHER_KIND.format("LoHa"))
        if change.w1_a.shape[1] != self.rank:
            raise Misfit(f"is no LoHa of rank {self.rank} there. Set --network-dim to the file's rank")
        for mine, theirs in zip(
            self.factors, (change.w1_a, change.w1_b, change.w2_a, change.w2_b), strict=True
        ):
            mine.copy_(theirs)
        self.hada_w2_a.mul_(change.scale / self.scale)


class LokrLinear(AdapterLinear):
    """W0 x + scale * kron(w1, w2) x (Edalati et al. 2022, arXiv:2212.10650), as two small products.

    w1 (l, m), w2 (k, n) with l k = out and m n = in, split by `factor` (see `factorise`). w2 is stored in full, and
    scale is 1, where the rank is half of w2's larger side or more; else as w2_a (k, r), w2_b (r, n).
    """

    units = 7

    def __init__(self, base: nn.Module, *, rank: int, alpha: float, factor: int = -1, **options: Any) -> None:
        self.rows, self.columns = factorise(base.out_features, factor), factorise(base.in_features, factor)
        self.full = 2 * rank >= max(self.rows[1], self.columns[1])
        super().__init__(base, rank=rank, alpha=rank if self.full else alpha, **options)

    def create(self, device: torch.device | str) -> None:
        (outer_rows, rows), (outer_columns, columns) = self.rows, self.columns
        self.lokr_w1 = _zeros(outer_rows, outer_columns, device)
        if self.full:
            self.lokr_w2 = _zeros(rows, columns, device)
        else:
            self.lokr_w2_a = _zeros(rows, self.rank, device)
            self.lokr_w2_b = _zeros(self.rank, columns, device)

    @property
    def second(self) -> tuple[nn.Parameter, ...]:
        """w2, or the factors whose product it is, from the left."""
        return (self.lokr_w2,) if self.full else (self.lokr_w2_a, self.lokr_w2_b)

    def change(self, x: Tensor) -> Tensor:
        w2 = self.second[0] if self.full else self.lokr_w2_a @ self.lokr_w2_b
        return self.dropped(_KroneckerProduct.apply(x, self.lokr_w1.to(x.dtype), w2.to(x.dtype)))

    def draw(self, generator: torch.Generator) -> None:
        draw_uniform(self.lokr_w1, generator)
        if not self.full:
            draw_uniform(self.lokr_w2_a, generator)

    @torch.no_grad()
    def load(self, deltas: Sequence[Delta]) -> None:
        change = _whole(deltas, self.base.out_features)
        shape = (self.rows[1], self.columns[1])
        if not isinstance(change, Kronecker):
            raise Misfit(OTHER_KIND.format("LoKr"))
        if tuple(change.w2.shape) != shape:
            raise Misfit(
                f"is no LoKr of these factors there, with a w2 of {shape[0]}x{shape[1]}. Set factor to the file's"
            )
        parts = (change.w2,) if self.full else _split(change.w2, self.rank)
        for mine, theirs in zip(self.second, parts, strict=True):
            mine.copy_(theirs)
        self.lokr_w1.copy_(change.w1 * (change.scale / self.scale))


class _HadamardProduct(torch.autograd.Function):
    """x ((a b) o (c d))^T, which keeps x and the four factors for the backward pass, and nothing of dW's size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        ctx.save_for_backward(x, a, b, c, d)
        return F.linear(x, (a @ b).mul_(c @ d))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, c, d = ctx.saved_tensors
        (grad,) = grads
        second, dense = c @ d, grad.flatten(0, -2).T @ x.flatten(0, -2)
        to_first = dense * second
        to_a, to_b = to_first @ b.T, a.T @ to_first
        del to_first  # so three of dW's size are there at most
        first = a @ b
        to_x = grad @ second.mul_(first) if ctx.needs_input_grad[0] else None
        to_second = dense.mul_(first)
        return to_x, to_a, to_b, to_second @ d.T, c.T @ to_second


class _KroneckerProduct(torch.autograd.Function):
    """kron(w1, w2) x = w1 X w2^T, with x (..., m n) laid out as matrices X (m, n), which keeps x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        ctx.save_for_backward(x, w1, w2)
        return (w1 @ F.linear(_matrices(x, w1, w2), w2)).flatten(-2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w2 = ctx.saved_tensors
        square = _matrices(x, w1, w2).flatten(0, -3)
        made = gradient.unflatten(-1, (len(w1), len(w2))).flatten(0, -3)
        for_inner = w1.t() @ made
        to_w1 = torch.einsum("tlk,tmk->lm", made, F.linear(square, w2))
        to_w2 = for_inner.flatten(0, 1).t() @ square.flatten(0, 1)
        to_x = (for_inner @ w2).view_as(x) if ctx.needs_input_grad[0] else None
        return to_x, to_w1, to_w2


def _matrices(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return x.unflatten(-1, (w1.shape[1], w2.shape[1]))


def factorise(size: int, factor: int) -> tuple[int, int]:
    """(small, large) with small * large = size, as LyCORIS splits: by `factor` if it divides, else near the square.

    factor -1 has no limit; another one that does not divide limits the smaller.
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    limit = size if factor < 0 else factor
    small = max((n for n in range(1, int(size**0.5) + 1) if size % n == 0 and n <= limit), default=1)
    return small, size // small


def _zeros(rows: int, columns: int, device: torch.device | str) -> nn.Parameter:
    return nn.Parameter(torch.zeros(rows, columns, device=device))


def _whole(deltas: Sequence[Delta], rows: int) -> Change | None:
    """The change, if it is a single one of all rows."""
    alone = len(deltas) == 1 and deltas[0].change.shape[0] == rows
    return deltas[0].change if alone else None


def _split(w2: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """w2 (k, n) as the product of (k, rank) and (rank, n). Raises Misfit when its own rank is higher."""
    u, s, v = torch.linalg.svd(w2.float(), full_matrices=False)
    if s[rank:].norm() > _SAME * s.norm():
        raise Misfit(f"has a rank over {rank} there. Set --network-dim to the file's rank")
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]
