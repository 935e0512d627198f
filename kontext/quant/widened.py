"""Linears that keep their weights in 16 bits and compute in float32: for processors without instructions for 16 bits."""

from collections.abc import Iterable

import torch
from torch import nn

from kontext.quant.linear import QuantisedLinear


class WidenedLinear(QuantisedLinear):
    """A frozen linear that computes in the type of its input, whatever its weight is kept in."""


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
