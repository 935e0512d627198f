"""The product with a weight that is kept in fewer bits than it is computed with, and restored for it.

On a CPU a copy of a whole weight would lie in fresh memory, and the system takes longer to provide that than the
processor takes to convert: 100 instead of 14 ms for 9216 x 3072 in bfloat16. So strips are restored, each into the
memory of the one before. A GPU, which keeps freed memory, restores the weight whole, as a compiler does.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kontext.model.outputs import rows_of
from kontext.quant.values import dequantise

STRIP = 2**21  # numbers: 8 MB


class Restored:
    """x W^T + b for x (n, in), and the gradient of x, of a weight and scale as in `Quantised`; a weight of 16 bits has no scale."""

    @staticmethod
    def forth(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        if not _by_strips(x):
            return F.linear(x, dequantise(weight, scale, x.dtype), bias)
        out = x.new_empty(len(x), len(weight))
        for rows, strip in _strips(weight, scale, x):
            if bias is None:
                torch.mm(x, strip.t(), out=out[:, rows])
            else:
                torch.addmm(bias[rows], x, strip.t(), out=out[:, rows])
        return out

    @staticmethod
    def back(gradient: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
        if not _by_strips(gradient):
            return gradient @ dequantise(weight, scale, gradient.dtype)
        out = gradient.new_zeros(len(gradient), columns_of(weight))
        for rows, strip in _strips(weight, scale, gradient):
            out.addmm_(gradient[:, rows], strip)
        return out


def restores_strips(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether no more than STRIP numbers of a weight are there at a time in `dtype`.

    Sums over strips are exact enough in float32 alone.
    """
    return device.type == "cpu" and dtype == torch.float32


def _by_strips(x: Tensor) -> bool:
    return restores_strips(x.device, x.dtype) and not torch.compiler.is_compiling()


def _strips(weight: Tensor, scale: Tensor | None, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of a weight at a time, in like's dtype: their numbers, and they, until the next are asked for."""
    count = max(1, min(STRIP // columns_of(weight), len(weight)))
    room = like.new_empty(count, columns_of(weight))
    for top in range(0, len(weight), count):
        rows = slice(top, min(top + count, len(weight)))
        part, scales = weight[rows], rows_of(scale, rows)
        yield rows, dequantise(part, scales, like.dtype, room=room[: len(part)])


def columns_of(weight: Tensor) -> int:
    """Inputs of a weight (out, in): a byte of 4-bit numbers holds two."""
    return weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)
