"""Linears with weights in few bits."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kontext.model.outputs import ALL, rows_of
from kontext.quant.products import multiply, multiply_back
from kontext.quant.restored import Restored, columns_of
from kontext.quant.values import Mode, Quantised, dequantise, grained


class Product(Protocol):
    """How a frozen linear multiplies: x (n, in) to (n, out), and gradients (n, out) to (n, in)."""

    @staticmethod
    def forth(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor: ...

    @staticmethod
    def back(gradient: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor: ...


class Rounded:
    """The product with x, and in the backward pass with the gradient, rounded to 8 bits too."""

    forth, back = staticmethod(multiply), staticmethod(multiply_back)


class _Frozen(torch.autograd.Function):
    """x W^T + b for x (n, in), which keeps for the backward pass the rounded weight, not the one it multiplied by."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        product: type[Product],
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.product = product
        ctx.save_for_backward(weight, scale)
        return product.forth(x, weight, scale, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.product.back(gradient, *ctx.saved_tensors), None, None, None, None


class QuantisedLinear(nn.Module):
    """A frozen linear: weight and scale as in `Quantised`, bias (out,) or None."""

    product: type[Product] = Restored

    def __init__(self, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape[0], columns_of(weight)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) that this stands for."""
        return dequantise(self.weight, self.scale, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out), in x's dtype; the gradient flows to x alone."""
        return self.some_outputs(x, ALL)

    def some_outputs(self, x: Tensor, rows: slice) -> Tensor:
        """Those of `forward` that these rows of the weight make."""
        frozen = (rows_of(part, rows) for part in (self.weight, self.scale, self.bias))
        # Laid out as rows out here: what a Function makes and returns as a view cannot be added to in place.
        return _Frozen.apply(x.flatten(0, -2), self.product, *frozen).unflatten(0, x.shape[:-1])

    def extra_repr(self) -> str:
        blocks = "unscaled" if self.scale is None else f"{self.scale.shape[1]} scales per row"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {self.weight.dtype}, {blocks}"
        )


class ProductLinear(QuantisedLinear):
    """A frozen linear in 8 bits that multiplies 8-bit numbers by 8-bit numbers, in both directions.

    Its scale is (out, 1), or None for a plain cast. Where it computes, `products.supported` must hold.
    """

    product = Rounded


def quantised_linear(value: Quantised, bias: Tensor | None, mode: Mode) -> QuantisedLinear:
    """The layer for a weight: with products of 8 bits if `mode` is for them and the weight fits them."""
    by_row = value.scale is None or value.scale.shape[1] == 1
    fast = mode.endswith("_fast") and by_row and grained(value.weight.shape)
    return (ProductLinear if fast else QuantisedLinear)(value.weight, value.scale, bias)
