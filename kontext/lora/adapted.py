"""The products of adapted linears, as autograd functions that keep little and add in place, in both directions.

Kept are x, which the layers around keep anyway, and H = x A^T (n, r).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kontext.model.outputs import rows_of
from kontext.model.remade import needless
from kontext.quant import Product, QuantisedLinear


class Plain:
    """The product of `nn.Linear`."""

    @staticmethod
    def forth(x: Tensor, weight: Tensor, scale: None, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def back(gradient: Tensor, weight: Tensor, scale: None) -> Tensor:
        return gradient @ weight


@dataclass(frozen=True)
class Frozen:
    """Rows of a frozen linear: weight (out, in), what scales it if it is in few bits, bias (out,) or None."""

    product: type[Product]
    weight: Tensor
    by_block: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(cls, linear: nn.Module, rows: slice) -> "Frozen":
        quantised = isinstance(linear, QuantisedLinear)
        parts = linear.weight, linear.scale if quantised else None, linear.bias
        return cls(linear.product if quantised else Plain, *(rows_of(part, rows) for part in parts))


def low_rank_product(
    x: Tensor, base: Frozen, down: Tensor, up: Tensor, scale: float, *, mask: Tensor | None = None
) -> Tensor:
    """x W^T + b + scale * (mask * x down^T) up^T for x (..., in), down (r, in), up (out, r), mask (..., r).

    Gradients go to x, down and up.
    """
    mask = None if mask is None else mask.flatten(0, -2)
    frozen = base.product, base.weight, base.by_block, base.bias
    unused = not torch.compiler.is_compiling() and needless.get()  # which a compiler cannot ask
    product = _LowRank.apply(x.flatten(0, -2), down, up, scale, mask, *frozen, unused)
    return product.unflatten(0, x.shape[:-1])


def stretched_product(
    x: Tensor,
    base: Frozen,
    down: Tensor,
    up: Tensor,
    scale: float,
    gain: Tensor,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """gain * (x W^T + scale * (mask * x down^T) up^T) + b, gain (out,) float32. Gradients go to it too."""
    mask = None if mask is None else mask.flatten(0, -2)
    frozen = base.product, base.weight, base.by_block, base.bias
    return _Stretched.apply(x.flatten(0, -2), down, up, scale, mask, *frozen, gain).unflatten(0, x.shape[:-1])


class _LowRank(torch.autograd.Function):
    """With H = mask * x A^T, and G the gradient of the result:

    dH = s G B * mask    dB = s G^T H    dA = dH^T x    dx = G W + dH A
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        scale: float,
        mask: Tensor | None,
        product: type[Product],
        weight: Tensor,
        by_block: Tensor | None,
        bias: Tensor | None,
        needless: bool,
    ) -> Tensor:
        hidden = _hidden(x, down, mask)
        ctx.save_for_backward(x, hidden, down, up, mask, weight, by_block)
        ctx.scale, ctx.product = scale, product
        if needless:
            return x.new_zeros(()).expand(len(x), len(up))
        return product.forth(x, weight, by_block, bias).addmm_(hidden, up.to(x.dtype).t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *_low_rank_gradients(ctx, gradient, *ctx.saved_tensors), *[None] * 7


def _hidden(x: Tensor, down: Tensor, mask: Tensor | None) -> Tensor:
    hidden = F.linear(x, down.to(x.dtype))
    return hidden if mask is None else hidden.mul_(mask)


def _low_rank_gradients(
    ctx: Any,
    gradient: Tensor,
    x: Tensor,
    hidden: Tensor,
    down: Tensor,
    up: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    by_block: Tensor | None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Of x, down and up."""
    for_hidden = (gradient @ up.to(x.dtype)).mul_(ctx.scale)
    if mask is not None:
        for_hidden *= mask
    for_up = (gradient.t() @ hidden).mul_(ctx.scale).to(up.dtype)
    for_down = (for_hidden.t() @ x).to(down.dtype)
    if not ctx.needs_input_grad[0]:
        return None, for_down, for_up
    for_x = ctx.product.back(gradient, weight, by_block).addmm_(for_hidden, down.to(x.dtype))
    return for_x, for_down, for_up


class _Stretched(torch.autograd.Function):
    """y = g * z + b for the z of `_LowRank` without bias. Kept is y too, which most of the layers after keep anyway:

    dz = g * G    dg = sum over tokens of G * z = sum of G * (y - b) / g

    The gain is applied as z + (g - 1) z: so 16 bits hold changes of it that are small beside 1.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        scale: float,
        mask: Tensor | None,
        product: type[Product],
        weight: Tensor,
        by_block: Tensor | None,
        bias: Tensor | None,
        gain: Tensor,
    ) -> Tensor:
        hidden = _hidden(x, down, mask)
        z = product.forth(x, weight, by_block, None).addmm_(hidden, up.to(x.dtype).t(), alpha=scale)
        y = z.addcmul_(z, (gain - 1).to(x.dtype))
        if bias is not None:
            y += bias
        ctx.save_for_backward(x, hidden, down, up, mask, weight, by_block, bias, gain, y)
        ctx.scale, ctx.product = scale, product
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *saved, bias, gain, y = ctx.saved_tensors
        for_gain = _along_tokens(gradient, y, bias)
        for_z = torch.addcmul(gradient, gradient, (gain - 1).to(gradient.dtype))
        return *_low_rank_gradients(ctx, for_z, *saved), *[None] * 6, for_gain / gain


def _along_tokens(gradient: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    """The sum of G * (y - b) over tokens, in float32."""
    product = y * gradient if bias is None else (y - bias).mul_(gradient)
    return product.sum(0, dtype=torch.float32)
