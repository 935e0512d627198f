"""Values that can be made again, so that autograd need not keep them.

A block marks what is cheap to repeat with `remade`, and calls what is dear to repeat through `product`. Both compute
as always. Only while somebody takes notes (`memory.remaking`) are result and inputs noted, and the backward pass is
given the inputs, which are kept anyway.

A block that runs a second time as a whole (`memory.recompute`) can do without the product that ends it, `last`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

repeating: ContextVar[bool] = ContextVar("repeating", default=False)
"""True while a block runs for what its backward pass needs, and its result goes nowhere."""

needless: ContextVar[bool] = ContextVar("needless", default=False)
"""True within a product whose result goes nowhere. Where that saves work, it may be anything of the right shape."""


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


def last(linear: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """linear(x), which is scaled and added to what the block gives, and to nothing else."""
    if torch.compiler.is_compiling() or not repeating.get():
        return linear(x)
    with within(needless):
        return linear(x)


@contextmanager
def within(mark: ContextVar[bool]) -> Iterator[None]:
    """Within, `mark` is set."""
    token = mark.set(True)
    try:
        yield
    finally:
        mark.reset(token)
