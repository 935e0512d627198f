"""Inputs of blocks that wait for the backward pass in host memory.

They leave on a stream of their own while the next blocks compute, and come back before their turn.
"""

import weakref
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from kontext.memory.copier import Copier, copier_of

LEAVING = 2  # tensors whose device memory is kept until their copy is over
AHEAD = 2  # tensors that are fetched before they are asked for: both streams of a block


@dataclass(eq=False)
class Waiting:
    """A tensor in host memory. here: the same on the device, while it leaves or after it was fetched."""

    host: Tensor
    device: torch.device
    here: Tensor | None
    before: "weakref.ref[Waiting] | None"


class Shelf:
    """Hooks for `saved_tensors_hooks`: what a forward pass puts here, its backward takes in reverse order.

    Tensors of a CPU stay where they are, unless a `copier` is given.
    """

    def __init__(self, copier: Copier | None = None) -> None:
        self.copier = copier
        self.leaving: deque[Waiting] = deque()
        self.last: weakref.ref[Waiting] | None = None

    def pack(self, tensor: Tensor) -> Tensor | Waiting:
        if tensor.numel() == 0 or (self.copier is None and not tensor.is_cuda):
            return tensor
        if self.copier is None:
            self.copier = copier_of(tensor.device)
        tensor = tensor.detach().contiguous()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self.copier.start(host.view(-1), tensor.view(-1))
        waiting = Waiting(host, tensor.device, tensor, self.last)
        self.last = weakref.ref(waiting)
        self.leaving.append(waiting)
        if len(self.leaving) > LEAVING:
            self.let_go(self.leaving.popleft())
        return waiting

    def let_go(self, waiting: Waiting) -> None:
        """Its device memory may be used again by what is computed from now on."""
        self.copier.wait(waiting.host)
        waiting.here = None

    def unpack(self, kept: Tensor | Waiting) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        while self.leaving:  # backward has begun
            self.let_go(self.leaving.popleft())
        wanted: Waiting | None = kept
        for _ in range(1 + AHEAD):
            if wanted is None:
                break
            self.fetch(wanted)
            wanted = wanted.before() if wanted.before else None
        self.copier.wait(kept.here)
        return kept.here

    def fetch(self, waiting: Waiting) -> None:
        if waiting.here is None:
            waiting.here = torch.empty(waiting.host.shape, dtype=waiting.host.dtype, device=waiting.device)
            self.copier.start(waiting.here.view(-1), waiting.host.view(-1))
