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
    """(1 + scale) * LayerNorm(x) + shift."""
    return torch.addcmul(shift, 1 + scale, layer_norm(x))


def gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """x + gate * update, in one pass over memory."""
    return torch.addcmul(x, gate, update)


def residual(x: Tensor, gate: Tensor, proj: nn.Module, update: Tensor) -> Tensor:
    """x + gate * proj(update)."""
    return gated(x, gate, proj(update))


@remade
def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


@remade
def join(first: Tensor, second: Tensor) -> Tensor:
    """Tokens (B, H, L, D) of both streams in one sequence."""
    return torch.cat((first, second), 2)


@remade
def beside(out: Tensor, hidden: Tensor) -> Tensor:
    """The attention's output, and GELU of the MLP's hidden values, along the channels."""
    return torch.cat((out, F.gelu(hidden, approximate="tanh")), -1)


def split_heads(x: Tensor, heads: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (B, L, 3 width + rest) as queries, keys and values, each (B, H, L, D), and the rest (B, L, rest): views."""
    return _split(x, heads, width) if torch.compiler.is_compiling() else _Split.apply(x, heads, width)


def _split(x: Tensor, heads: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    qkv, rest = x.split((3 * width, x.shape[-1] - 3 * width), -1)
    q, k, v = rearrange(qkv, "B L (three H D) -> three B H L D", three=3, H=heads)
    return q, k, v, rest


class _Split(torch.autograd.Function):
    """`_split`, whose backward writes each gradient once, to where it belongs in that of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.shape, ctx.heads, ctx.width = x.shape, heads, width
        return _split(x, heads, width)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        whole = gradients[0].new_empty(ctx.shape)
        for part, gradient in zip(_split(whole, ctx.heads, ctx.width), gradients, strict=True):
            part.copy_(gradient)
        return whole, None, None


@remade
def turned(x: Tensor, scale: Tensor, pe: Tensor) -> Tensor:
    """Queries or keys (B, H, L, D) after RMS norm with `scale` (D,) and rotation by their positions."""
    if torch.compiler.is_compiling():
        return _turn(x, scale, pe)
    return _Turned.apply(x, scale, pe)


def _turn(x: Tensor, scale: Tensor, pe: Tensor) -> Tensor:
    return rotate(F.rms_norm(x, scale.shape, scale.to(x.dtype), eps=EPSILON), pe)


class _Turned(torch.autograd.Function):
    """`_turn`, which keeps x alone. Where the norm is not one kernel, autograd keeps float32 copies of what is between.

    With n = r x, r = 1 / sqrt(mean(x^2) + eps), and h the gradient at n: the gradient at x is r (h - n mean(h n)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, pe: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, pe)
        return _turn(x, scale, pe)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, scale, pe = ctx.saved_tensors
        values = x.float()
        norm = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
        rate = (norm.square_() / values.shape[-1]).add_(EPSILON).rsqrt_()
        normed = values * rate
        turned_back = rotate(gradient.float(), pe.conj())
        for_scale = None
        if ctx.needs_input_grad[1]:
            for_scale = (turned_back * normed).flatten(0, -2).sum(0).to(scale.dtype)
        if not ctx.needs_input_grad[0]:
            return None, for_scale, None
        h = turned_back.mul_(scale)
        common = (h * normed).mean(-1, keepdim=True)
        return h.addcmul_(normed, common, value=-1).mul_(rate).to(x.dtype), for_scale, None
