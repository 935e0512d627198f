"""Linears with weights in few bits."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kontext.quant.products import multiply, multiply_back
from kontext.quant.values import Mode, Quantised, dequantise, grained


class _Restored(torch.autograd.Function):
    """x W^T + b, which keeps the rounded weight for the backward pass, not the one it multiplied by."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, dequantise(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        return gradient @ dequantise(weight, scale, gradient.dtype), None, None, None


class QuantisedLinear(nn.Module):
    """A frozen linear: weight and scale as in `Quantised`, bias (out,) or None."""

    def __init__(self, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        packed = 2 if weight.dtype == torch.uint8 else 1
        self.out_features, self.in_features = weight.shape[0], packed * weight.shape[1]
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) that this stands for."""
        return dequantise(self.weight, self.scale, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out), in x's dtype; the gradient flows to x alone."""
        return self.multiply(x, self.weight, self.scale, self.bias)

    def some_outputs(self, x: Tensor, rows: slice) -> Tensor:
        """Those of `forward` that these rows of the weight make."""
        scale, bias = (part if part is None else part[rows] for part in (self.scale, self.bias))
        return self.multiply(x, self.weight[rows], scale, bias)

    @staticmethod
    def multiply(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        return _Restored.apply(x, weight, scale, bias)

    def extra_repr(self) -> str:
        blocks = "unscaled" if self.scale is None else f"{self.scale.shape[1]} scales per row"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {self.weight.dtype}, {blocks}"
        )


class _Products(torch.autograd.Function):
    """The same for x (n, in), with x, and in the backward pass the gradient, rounded to 8 bits too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return multiply(x, weight, scale, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return multiply_back(gradient, *ctx.saved_tensors), None, None, None


class ProductLinear(QuantisedLinear):
    """A frozen linear in 8 bits that multiplies 8-bit numbers by 8-bit numbers, in both directions.

    Its scale is (out, 1), or None for a plain cast. Where it computes, `products.supported` must hold.
    """

    @staticmethod
    def multiply(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        # Laid out as rows out here: what a Function makes and returns as a view cannot be added to in place.
        rows = _Products.apply(x.flatten(0, -2), weight, scale, bias)
        return rows.unflatten(0, x.shape[:-1])


def quantised_linear(value: Quantised, bias: Tensor | None, mode: Mode) -> QuantisedLinear:
    """The layer for a weight: with products of 8 bits if `mode` is for them and the weight fits them."""
    by_row = value.scale is None or value.scale.shape[1] == 1
    fast = mode.endswith("_fast") and by_row and grained(value.weight.shape)
    return (ProductLinear if fast else QuantisedLinear)(value.weight, value.scale, bias)
