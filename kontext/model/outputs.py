"""Some outputs of a linear of any kind, without computing the others where that can be."""

import torch.nn.functional as F
from torch import Tensor, nn


def some_outputs(linear: nn.Module, x: Tensor, rows: slice) -> Tensor:
    """linear(x)[..., rows] for x (..., in).

    A plain linear multiplies by these rows of its weight alone; others may have a method of this name that does.
    """
    if isinstance(linear, nn.Linear):
        return F.linear(x, linear.weight[rows], None if linear.bias is None else linear.bias[rows])
    if hasattr(linear, "some_outputs"):
        return linear.some_outputs(x, rows)
    return linear(x)[..., rows]
