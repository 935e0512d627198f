"""Streaming of frozen block weights from host memory: a model larger than the card, with the same numbers.

The weights of a streamed block lie in one slab of pinned host memory. While a block computes, the slab of the
next one is copied on a stream of its own into the other slot of a small ring on the device. Weights never
travel back: they are frozen. What is trained (LoRA) stays on the device.

Backward needs the weights again. Wrapped as Recomputed(Streamed(block)), recomputation re-enters the wrapper
just before each block's backward, in reverse order, so one binding serves both. Without recomputation
autograd would keep views of slots that are overwritten before its turn, so it is given a place in a slab to
keep instead, and fetches the block again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from kontext.memory.copier import copier_of
from kontext.memory.modulation import HostModulation
from kontext.memory.pinned import pinned
from kontext.memory.recompute import recomputing
from kontext.memory.wrapped import Wrapped
from kontext.model.blocks import Modulation
from kontext.model.transformer import Transformer

ALIGNMENT = 256

Swap = int | Literal["max"]


@dataclass(frozen=True)
class Piece:
    """Where one tensor of a block lies in its slab."""

    module: nn.Module
    name: str
    offset: int
    nbytes: int
    shape: torch.Size
    dtype: torch.dtype

    def view(self, memory: Tensor) -> Tensor:
        return memory[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Place:
    """A tensor that autograd keeps of a streamed block: `offset` bytes into its slot."""

    offset: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]


def frozen_tensors(block: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Every parameter that is not trained, and every buffer, with the module that holds it.

    Modulation is left out: it is computed ahead of all blocks, see `memory.modulation`.
    """
    modulations = (m for m in block.modules() if isinstance(m, Modulation | HostModulation))
    ahead = {part for modulation in modulations for part in modulation.modules()}
    for module in (module for module in block.modules() if module not in ahead):
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                yield module, name, parameter
        for name, buffer in module.named_buffers(recurse=False):
            yield module, name, buffer


class Slab:
    """The frozen tensors of one block in a single piece of host memory, pinned where there is CUDA."""

    def __init__(self, block: nn.Module) -> None:
        self.pieces: list[Piece] = []
        size = 0
        for module, name, tensor in frozen_tensors(block):
            nbytes = tensor.numel() * tensor.element_size()
            self.pieces.append(Piece(module, name, size, nbytes, tensor.shape, tensor.dtype))
            size += -(-nbytes // ALIGNMENT) * ALIGNMENT
        self.memory = pinned(size)
        for piece in self.pieces:
            piece.view(self.memory).copy_(getattr(piece.module, piece.name))
        self.bind(self.memory)

    def bind(self, memory: Tensor) -> None:
        """Let the block's tensors be views of `memory`, which holds the slab's bytes."""
        for piece in self.pieces:
            getattr(piece.module, piece.name).data = piece.view(memory)


class Ring:
    """Slots on the device that hold the block in use and those ahead of it."""

    def __init__(self, slabs: Sequence[Slab], device: torch.device, *, slots: int = 2) -> None:
        assert slots >= 2
        self.slabs = slabs
        self.copier = copier_of(device)
        size = max(slab.memory.numel() for slab in slabs)
        self.slots = [
            torch.empty(size, dtype=torch.uint8, device=device) for _ in range(min(slots, len(slabs)))
        ]
        self.held: list[int | None] = [None] * len(self.slots)
        self.last = -1

    def fetch(self, index: int) -> None:
        """Bind block `index` to its slot and start copying the block that is needed next."""
        if index == self.last:
            return
        slot = self.load(index, keep=None)
        self.copier.wait(self.slots[slot])
        self.slabs[index].bind(self.slots[slot])
        following = self.predict(index)
        self.last = index
        if following is not None:
            self.load(following, keep=slot)

    def load(self, index: int, *, keep: int | None) -> int:
        """The slot of block `index`, copied there unless it is. `keep` is in use, the others are free."""
        if index in self.held:
            return self.held.index(index)
        candidates = [slot for slot in range(len(self.slots)) if slot != keep]
        slot = next((s for s in candidates if self.held[s] is None), None)
        if slot is None:
            slot = max(candidates, key=lambda s: abs(self.held[s] - index))
        self.copier.start(self.slots[slot], self.slabs[index].memory)
        self.held[slot] = index
        return slot

    def predict(self, index: int) -> int | None:
        """The block after `index`: upwards in forward, downwards in backward, the first again when sampling.

        At either end of a training step the ring already holds what comes next.
        """
        following = index - 1 if index == self.last - 1 else index + 1
        if len(self.slots) == 1:
            return None
        if 0 <= following < len(self.slabs):
            return following
        return None if torch.is_grad_enabled() else 0


class Streamed(Wrapped):
    """A block whose frozen weights are fetched just before it computes."""

    def __init__(self, block: nn.Module, ring: Ring, index: int) -> None:
        super().__init__(block)
        self.ring = ring
        self.index = index

    def forward(self, *args: Tensor, **named: Any) -> Tensor | tuple[Tensor, Tensor]:
        self.ring.fetch(self.index)
        if not torch.is_grad_enabled() or recomputing.get():
            return self.block(*args, **named)
        with saved_tensors_hooks(self.pack, self.unpack):
            return self.block(*args, **named)

    def pack(self, tensor: Tensor) -> Tensor | Place:
        """What autograd keeps of a tensor: its place, if it lies in this block's slot."""
        slot = self.ring.slots[self.ring.held.index(self.index)]
        if tensor.untyped_storage().data_ptr() != slot.untyped_storage().data_ptr():
            return tensor
        offset = tensor.data_ptr() - slot.data_ptr()
        return Place(offset, tensor.dtype, tensor.shape, tensor.stride())

    def unpack(self, kept: Tensor | Place) -> Tensor:
        self.ring.fetch(self.index)  # also for a tensor: what is made from it may need the block's weights
        if isinstance(kept, Tensor):
            return kept
        slot = self.ring.slots[self.ring.held.index(self.index)]
        return slot[kept.offset :].view(kept.dtype).as_strided(kept.shape, kept.stride)


def streamed_indices(total: int, count: int) -> list[int]:
    """`count` of `total` blocks, evenly spread, so that resident blocks hide the copies of streamed ones."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def streamed_blocks(doubles: int, singles: int, swap: Swap) -> tuple[list[int], list[int]]:
    """Numbers of the double and of the single blocks that are streamed, of so many of each.

    `swap` counts as in musubi-tuner: N // 2 double blocks and (N - N // 2) * 2 + 1 single ones; "max" is all.
    """
    if swap == "max":
        return list(range(doubles)), list(range(singles))
    if swap == 0:
        return [], []
    return streamed_indices(doubles, swap // 2), streamed_indices(singles, (swap - swap // 2) * 2 + 1)


def stream_blocks(model: Transformer, swap: Swap, device: torch.device, *, slots: int = 2) -> int:
    """Keep the weights of some blocks on the host and stream these blocks; returns how many.

    For `swap` see `streamed_blocks`. Attach adapters before and recompute after: only frozen tensors move.
    """
    double, single = streamed_blocks(len(model.double_blocks), len(model.single_blocks), swap)
    places = [(model.double_blocks, i) for i in double] + [(model.single_blocks, i) for i in single]
    ring = Ring([Slab(blocks[i]) for blocks, i in places], device, slots=slots)
    for index, (blocks, i) in enumerate(places):
        blocks[i] = Streamed(blocks[i], ring, index)
    return len(places)
