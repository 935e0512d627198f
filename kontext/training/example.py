"""Batches to train on with everything random about them, and how they travel from the process that loaded them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from kontext.data.batches import Batch
from kontext.errors import UserError

ALIGNMENT = 64  # bytes: as much as any type needs


@dataclass(frozen=True)
class Example:
    """A batch with everything random about it, but dropout.

    noise: (B, C, h, w); u: (B,) float64 in 0..1, from which the noise levels follow; share: the part that this batch
    has in the items of its step.
    """

    epoch: int
    index: int
    share: float
    batch: Batch
    noise: Tensor
    u: Tensor

    def to(self, device: torch.device) -> "Example":
        """On the device, but for u: levels are made on the CPU."""
        if device.type == "cpu":
            return self

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(self, batch=_in_batch(self.batch, move), noise=move(self.noise))


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in a parcel."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Parcel:
    """Examples in one piece of memory: slots where their tensors are, and the bytes of all of them (n,) uint8.

    Every tensor that one process hands to another costs both about a third of a millisecond, however small it is.
    error: why the example that should come next is missing.
    """

    frames: tuple[Example, ...]
    data: Tensor
    error: UserError | None = None

    def pin_memory(self) -> "Parcel":
        """What DataLoader calls, so that copies to the GPU need not be waited for."""
        return replace(self, data=self.data.pin_memory())

    def open(self) -> Iterator[Example]:
        """The examples; their tensors are views of `data`. Raises `error` behind the last."""
        for frame in self.frames:
            yield _each(frame, self.view)
        if self.error is not None:
            raise self.error

    def view(self, slot: Any) -> Tensor:
        size = prod(slot.shape) * slot.dtype.itemsize
        return self.data[slot.start : slot.start + size].view(slot.dtype).view(slot.shape)


def pack(examples: Sequence[Example], error: UserError | None = None) -> Parcel:
    """The inverse of `Parcel.open`."""
    taken: list[tuple[Slot, Tensor]] = []
    end = 0

    def slot(tensor: Tensor) -> Any:
        nonlocal end
        taken.append((Slot(end, tensor.dtype, tuple(tensor.shape)), tensor))
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return taken[-1][0]

    frames = tuple(_each(example, slot) for example in examples)
    parcel = Parcel(frames, torch.empty(end, dtype=torch.uint8), error)
    for place, tensor in taken:
        parcel.view(place).copy_(tensor)
    return parcel


def _each(example: Example, change: Callable[[Any], Any]) -> Example:
    """The example with something else in the place of every tensor."""
    batch = _in_batch(example.batch, change)
    return replace(example, batch=batch, noise=change(example.noise), u=change(example.u))


def _in_batch(batch: Batch, change: Callable[[Any], Any]) -> Batch:
    """The batch with something else in the place of every tensor."""
    return replace(
        batch,
        latents=change(batch.latents),
        references=tuple(change(reference) for reference in batch.references),
        txt=change(batch.txt),
        vector=change(batch.vector),
        masks=None if batch.masks is None else change(batch.masks),
    )
