"""What a block does between its matrix products: passes over memory, each marked so that it can be made again.

B batch, L tokens, D width, H heads.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kontext.model.attention import rotate
from kontext.model.remade import remade

EPSILON = 1e-6


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=EPSILON)


@remade
def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) * LayerNorm(x) + shift: x (B, L, D), shift and scale (B, 1, D). One item takes one pass."""
    if len(x) == 1:
        width = x.shape[-1:]
        return F.layer_norm(x, width, (1 + scale).view(width), shift.reshape(width), eps=EPSILON)
    return torch.addcmul(shift, 1 + scale, layer_norm(x))


def gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """x + gate * update, in one pass over memory."""
    return torch.addcmul(x, gate, update)


def residual(x: Tensor, gate: Tensor, proj: nn.Module, update: Tensor) -> Tensor:
    """x + gate * proj(update)."""
    return gated(x, gate, proj(update))


@remade
def join(first: Tensor, second: Tensor, axis: int = 2) -> Tensor:
    """Tokens of both in one sequence. They lie along `axis`: (B, H, L, D)."""
    return torch.cat((first, second), axis)


def split_heads(x: Tensor, heads: int, width: int, count: int = 3) -> tuple[Tensor, ...]:
    """x (B, L, count width + rest) as `count` tensors (B, H, L, D), queries, keys, values, and the rest: views."""
    split = _split if torch.compiler.is_compiling() else _Split.apply
    return split(x, heads, width, count)


def _split(x: Tensor, heads: int, width: int, count: int) -> tuple[Tensor, ...]:
    inside, rest = x.split((count * width, x.shape[-1] - count * width), -1)
    return *rearrange(inside, "B L (n H D) -> n B H L D", n=count, H=heads), rest


class _Split(torch.autograd.Function):
    """`_split`, whose backward writes each gradient once, to where it belongs in that of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *sizes: int) -> tuple[Tensor, ...]:
        ctx.shape, ctx.sizes = x.shape, sizes
        return _split(x, *sizes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        whole = gradients[0].new_empty(ctx.shape)
        for part, gradient in zip(_split(whole, *ctx.sizes), gradients, strict=True):
            part.copy_(gradient)
        return whole, None, None, None


def turned(x: Tensor, scale: Tensor, pe: Tensor) -> Tensor:
    """Queries or keys (B, H, L, D) after RMS norm with `scale` (D,) and rotation by their positions."""
    rate = None if torch.compiler.is_compiling() else _rate(x.detach())
    return _turned(x, rate, scale, pe)


@remade
def _turned(x: Tensor, rate: Tensor | None, scale: Tensor, pe: Tensor) -> Tensor:
    if rate is None:  # a compiler makes one pass of it
        return rotate(F.rms_norm(x, scale.shape, scale.to(x.dtype), eps=EPSILON), pe)
    return _Turned.apply(x, rate, scale, pe)


def _rate(x: Tensor) -> Tensor:
    """1 / sqrt(mean(x^2) + eps), (..., 1), in float32."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return (norm.square_() / x.shape[-1]).add_(EPSILON).rsqrt_()


def _times(values: Tensor, rate: Tensor, dtype: torch.dtype) -> Tensor:
    """values * rate in `dtype`, which a GPU rounds to on the way out; in the memory of `values` where it is theirs."""
    out = values if values.dtype == dtype else torch.empty_like(values, dtype=dtype)
    return torch.mul(values, rate, out=out)


class _Turned(torch.autograd.Function):
    """RMS norm and rotation, in the fewest passes that there are, keeping x and the rate. Autograd's own norm makes
    float32 copies on a CPU; that of CUDA first lays x out anew, and takes rows of one head at a time, each by a block.

    With r = 1 / sqrt(mean(x^2) + eps), and h the gradient at r x: the gradient at x is r (h - r^2 x mean(h x)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: Tensor, scale: Tensor, pe: Tensor) -> Tensor:
        ctx.save_for_backward(x, rate, scale, pe)
        values = x * scale.float()
        torch.view_as_complex(values.unflatten(-1, (-1, 2))).mul_(pe)
        return _times(values, rate, x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, rate, scale, pe = ctx.saved_tensors
        turned_back = rotate(gradient.float(), pe.conj())
        for_scale = None
        if ctx.needs_input_grad[2]:
            for_scale = (turned_back * x).mul_(rate).flatten(0, -2).sum(0).to(scale.dtype)
        if not ctx.needs_input_grad[0]:
            return None, None, for_scale, None
        h = turned_back.mul_(scale)
        common = (h * x).mean(-1, keepdim=True).mul_(rate.square())
        return _times(h.addcmul_(x, common, value=-1), rate, x.dtype), None, for_scale, None
