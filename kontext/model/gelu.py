"""GELU with the tanh approximation, alone or written straight to where it belongs.

0.5 x (1 + tanh(u)) = x sigmoid(2 u) with u = sqrt(2/pi) (x + 0.044715 x^3) (Hendrycks and Gimpel, 2016). On a CPU
torch takes three times as long for a tanh as for a sigmoid, so there the right side is computed.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kontext.model.remade import remade

LINEAR = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715 * LINEAR
TILE = 1 << 19  # values that the caches hold between the passes


@remade
def gelu(x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    return _GELU.apply(x)


@remade
def beside(first: Tensor, hidden: Tensor) -> Tensor:
    """`first`, and GELU of `hidden`, along the channels."""
    if torch.compiler.is_compiling():
        return torch.cat((first, F.gelu(hidden, approximate="tanh")), -1)
    return _Beside.apply(first, hidden)


def write_gelu(x: Tensor, out: Tensor) -> None:
    """GELU of x (..., D) into `out`, of its shape, which may be channels of a wider tensor. Outside autograd."""
    if x.is_cuda or x.dtype != torch.float32:
        torch._C._nn.gelu(x, approximate="tanh", out=out)
        return
    linear = x.new_tensor(LINEAR)
    rows = max(1, TILE // x.shape[-1])
    for part, result in zip(x.flatten(0, -2).split(rows), out.flatten(0, -2).split(rows), strict=True):
        torch.addcmul(linear, part, part, value=CUBIC, out=result)
        result.mul_(part).sigmoid_().mul_(part)


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        write_gelu(x, out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.ops.aten.gelu_backward(gradient, *ctx.saved_tensors, approximate="tanh")


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: Tensor, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        width = first.shape[-1]
        out = hidden.new_empty(*hidden.shape[:-1], width + hidden.shape[-1])
        out[..., :width] = first
        write_gelu(hidden, out[..., width:])
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (hidden,) = ctx.saved_tensors
        first, rest = gradient.tensor_split([gradient.shape[-1] - hidden.shape[-1]], -1)
        # A copy of the narrow part, which attention makes anyway: a view would keep the whole alive until then.
        return first.contiguous(), torch.ops.aten.gelu_backward(rest, hidden, approximate="tanh")
