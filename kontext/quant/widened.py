"""Linears that keep their weights in 16 bits and compute in float32: for processors without instructions for 16 bits.

A copy of a whole weight would lie in fresh memory, and the system takes longer to provide that than the processor
takes to convert: 100 instead of 14 ms for 9216 x 3072. So strips are converted, each into the memory of the one before.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from kontext.quant.linear import QuantisedLinear, Restored

STRIP = 2**21  # numbers: 8 MB


def _strips(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of a weight at a time, in `dtype`: their numbers, and they, until the next are asked for."""
    rows = max(1, min(STRIP // weight.shape[1], len(weight)))
    memory = weight.new_empty(rows, weight.shape[1], dtype=dtype)
    for number, part in enumerate(weight.split(rows)):
        yield slice(number * rows, number * rows + len(part)), memory[: len(part)].copy_(part)


class InStrips:
    """The product with a weight that is converted strip by strip; a compiler gets it whole."""

    @staticmethod
    def forth(x: Tensor, weight: Tensor, scale: None, bias: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling():
            return Restored.forth(x, weight, scale, bias)
        out = x.new_empty(len(x), len(weight))
        for rows, strip in _strips(weight, x.dtype):
            if bias is None:
                torch.mm(x, strip.t(), out=out[:, rows])
            else:
                torch.addmm(bias[rows], x, strip.t(), out=out[:, rows])
        return out

    @staticmethod
    def back(gradient: Tensor, weight: Tensor, scale: None) -> Tensor:
        if torch.compiler.is_compiling():
            return Restored.back(gradient, weight, scale)
        out = gradient.new_zeros(len(gradient), weight.shape[1])
        for rows, strip in _strips(weight, gradient.dtype):
            out.addmm_(gradient[:, rows], strip)
        return out


class WidenedLinear(QuantisedLinear):
    """A frozen linear that computes in the type of its input, whatever its weight is kept in."""

    product = InStrips


def keep_in(model: nn.Module, layers: Iterable[str], dtype: torch.dtype) -> set[str]:
    """Linears of a model on the meta device shall keep their weights in `dtype`, whatever they compute in.

    Returns the names of these weights, which are to be filled with tensors of `dtype`.
    """
    names = set()
    for layer in layers:
        linear = model.get_submodule(layer)
        model.set_submodule(layer, WidenedLinear(linear.weight.to(dtype), None, linear.bias))
        names.add(f"{layer}.weight")
    return names
