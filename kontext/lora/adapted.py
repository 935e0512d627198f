"""The product of an adapted linear, as one autograd function."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kontext.model.outputs import rows_of
from kontext.quant import Product, QuantisedLinear


class Plain:
    """The product of `nn.Linear`."""

    @staticmethod
    def forth(x: Tensor, weight: Tensor, scale: None, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def back(gradient: Tensor, weight: Tensor, scale: None) -> Tensor:
        return gradient @ weight


def adapted_product(
    base: nn.Module, x: Tensor, down: Tensor, up: Tensor, scale: float, rows: slice
) -> Tensor:
    """(W x + b + scale * up down x)[..., rows] for x (..., in), down (r, in), up (out, r) and the base's W and b.

    Gradients go to x, down and up.
    """
    quantised = isinstance(base, QuantisedLinear)
    product = base.product if quantised else Plain
    parts = (base.weight, base.scale if quantised else None, base.bias)
    frozen = (rows_of(part, rows) for part in parts)
    out = _Adapted.apply(x.flatten(0, -2), down, rows_of(up, rows), scale, product, *frozen)
    return out.unflatten(0, x.shape[:-1])


class _Adapted(torch.autograd.Function):
    """x W^T + b + s x A^T B^T, which adds the adapter's share in place, in both directions.

    Kept are x, which the layers around keep anyway, and x A^T (n, r). With H = x A^T and G the gradient of the result:

        dH = s G B    dB = s G^T H    dA = dH^T x    dx = G W + dH A
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        scale: float,
        product: type[Product],
        weight: Tensor,
        by_block: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        hidden = F.linear(x, down.to(x.dtype))
        ctx.save_for_backward(x, hidden, down, up, weight, by_block)
        ctx.scale, ctx.product = scale, product
        return product.forth(x, weight, by_block, bias).addmm_(hidden, up.to(x.dtype).t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, down, up, weight, by_block = ctx.saved_tensors
        for_hidden = (gradient @ up.to(x.dtype)).mul_(ctx.scale)
        for_up = (gradient.t() @ hidden).mul_(ctx.scale).to(up.dtype)
        for_down = (for_hidden.t() @ x).to(down.dtype)
        for_x = None
        if ctx.needs_input_grad[0]:
            for_x = ctx.product.back(gradient, weight, by_block).addmm_(for_hidden, down.to(x.dtype))
        return for_x, for_down, for_up, *[None] * 5
