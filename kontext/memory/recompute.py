"""Gradient checkpointing: a block forgets what it computed and computes it again in the backward pass."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from kontext.memory.copier import Copier
from kontext.memory.offloading import Shelf
from kontext.memory.policies import Policies, places
from kontext.memory.wrapped import Wrapped
from kontext.model.remade import repeating, within
from kontext.model.transformer import Transformer

recomputing: ContextVar[bool] = ContextVar("recomputing", default=False)
"""True while a block runs, for the first or the second time, that will run again before its backward."""


class Recomputed(Wrapped):
    """A transformer block that keeps nothing but its inputs for the backward pass.

    With a `shelf` the token streams among these wait in host memory. Gradients equal those of the plain block;
    dropout draws the same numbers again.
    """

    def __init__(self, block: nn.Module, *, shelf: Shelf | None = None) -> None:
        super().__init__(block)
        self.shelf = shelf

    def forward(self, *inputs: Tensor, **named: Any) -> Tensor | tuple[Tensor, ...]:
        """Inputs are the block's: one or two token streams, the modulation and the position table."""
        *streams, mod, pe = inputs
        if not torch.is_grad_enabled():
            return self.block(*inputs, **named)
        with self._storage():
            block = partial(self.block, **named)
            runs = partial(_runs, modulation_is_trained=mod.requires_grad)
            return checkpoint(partial(_call, block, mod, pe), *streams, use_reentrant=False, context_fn=runs)

    def _storage(self) -> AbstractContextManager[object]:
        return saved_tensors_hooks(self.shelf.pack, self.shelf.unpack) if self.shelf else nullcontext()


def _call(
    block: Callable[..., Any], mod: Tensor, pe: Tensor, *streams: Tensor
) -> Tensor | tuple[Tensor, ...]:
    with within(recomputing):
        return block(*streams, mod, pe)


def _runs(
    *, modulation_is_trained: bool
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Of the first run and of the second. What is learned for a gate takes the product that it scales."""
    return nullcontext(), nullcontext() if modulation_is_trained else within(repeating)


def recompute_blocks(
    model: Transformer, policies: Policies = "whole", *, copier: Copier | None = None
) -> None:
    """Wraps the blocks of `model` that are recomputed whole. Attach adapters before: module names change.

    copier: of what is offloaded, see `Shelf`.
    """
    shelf = Shelf(copier)
    for blocks, i, policy in places(model, policies):
        if policy in ("whole", "offloaded"):
            blocks[i] = Recomputed(blocks[i], shelf=shelf if policy == "offloaded" else None)
