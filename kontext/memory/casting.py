"""Weights that are kept in one precision and computed with in another.

Small updates of a weight are lost in 16 bits, so what is trained is kept in float32. Each use of it makes a rounded
copy, which lives as long as the computation needs it: with recomputation, for one block at a time. Gradients arrive in
the precision of what is kept.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Cast(nn.Module):
    """A weight as it is computed with."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype)


def compute_in(model: nn.Module, names: Iterable[str], dtype: torch.dtype) -> None:
    """From now on the model computes with these of its parameters in `dtype`. They themselves stay as they are.

    Their modules give the rounded copy under the parameter's name.
    """
    for name in names:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if getattr(module, attribute).dtype != dtype:
            parametrize.register_parametrization(module, attribute, Cast(dtype), unsafe=True)
