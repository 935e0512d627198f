"""Some outputs of a linear of any kind, without computing the others where that can be."""

import torch.nn.functional as F
from torch import Tensor, nn

ALL = slice(None)


def some_outputs(linear: nn.Module, x: Tensor, rows: slice) -> Tensor:
    """linear(x)[..., rows] for x (..., in).

    A plain linear multiplies by these rows of its weight alone; others may have a method of this name that does.
    """
    if isinstance(linear, nn.Linear):
        return F.linear(x, rows_of(linear.weight, rows), rows_of(linear.bias, rows))
    if hasattr(linear, "some_outputs"):
        return linear.some_outputs(x, rows)
    return linear(x)[..., rows]


def rows_of(part: Tensor | None, rows: slice) -> Tensor | None:
    """These rows of a weight, a bias or scales, if the linear has any; `ALL` is the tensor itself, and no view."""
    return part if part is None or rows == ALL else part[rows]
