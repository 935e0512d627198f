"""Values that can be made again, so that autograd need not keep them.

A block marks what is cheap to repeat with `remade`, and calls what is dear to repeat through `product`. Both compute
as always. Only while somebody takes notes (`memory.remaking`) are result and inputs noted, and the backward pass is
given the inputs, which are kept anyway.
"""

from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, Protocol

import torch
from torch import Tensor

P = ParamSpec("P")


class Notes(Protocol):
    """Who is told of results that can be made again."""

    def elementwise(self, function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> Tensor:
        """function(*inputs), which costs a pass over memory."""

    def projection(self, function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> Tensor:
        """function(*inputs), which holds one square matrix product, and perhaps dropout."""

    def product(self, function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> Tensor:
        """function(*inputs), which holds large matrix products, and perhaps dropout."""


notes: ContextVar[Notes | None] = ContextVar("notes", default=None)


def _taker() -> Notes | None:
    """Who takes notes. A compiled block has a plan of its own for what it makes again."""
    return None if torch.compiler.is_compiling() else notes.get()


def remade(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Marks an elementwise function of tensors and numbers, given by position."""

    @wraps(function)
    def noted(*inputs: P.args, **named: P.kwargs) -> Tensor:
        taker = _taker()
        return function(*inputs, **named) if taker is None else taker.elementwise(function, inputs)

    return noted


def projection(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """function(*inputs), as `Notes.projection` says."""
    taker = _taker()
    return function(*inputs) if taker is None else taker.projection(function, inputs)


def product(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """function(*inputs), as `Notes.product` says."""
    taker = _taker()
    return function(*inputs) if taker is None else taker.product(function, inputs)
