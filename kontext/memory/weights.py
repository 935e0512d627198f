"""Bytes of a transformer's weights by where they stand, from its sizes alone."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from kontext.memory.placement import Placement
from kontext.memory.streaming import ALIGNMENT, streamed_blocks
from kontext.model.blocks import Modulation
from kontext.model.transformer import Transformer, TransformerConfig

LinearBytes = Callable[[int, int], int]
"""Bytes of the weight (out, in) of a block's linear as it is kept."""

SLOTS = 2  # of the ring of streamed blocks


@dataclass(frozen=True)
class BlockBytes:
    """Of one block: its weights without modulation, the same in a slab of the ring, its modulation."""

    weights: int
    slab: int
    modulation: int


@dataclass(frozen=True)
class Weights:
    """Of a whole transformer. outer: what belongs to no block; scratch: a quantised weight made plain for its product."""

    config: TransformerConfig
    double: BlockBytes
    single: BlockBytes
    outer: int
    scratch: int

    def placed(self, placement: Placement) -> "Placed":
        """Where they lie under a placement."""
        config = self.config
        streamed = streamed_blocks(config.double_blocks, config.single_blocks, placement.swap)
        kinds = list(
            zip(
                (self.double, self.single),
                (config.double_blocks, config.single_blocks),
                map(len, streamed),
                strict=True,
            )
        )
        modulation = sum(block.modulation * count for block, count, _ in kinds)
        slabs = [block.slab for block, _, swapped in kinds for _ in range(swapped)]
        resident = self.outer + sum(block.weights * (count - swapped) for block, count, swapped in kinds)
        return Placed(
            device=resident + (0 if placement.modulation else modulation),
            ring=min(SLOTS, len(slabs)) * max(slabs, default=0),
            host=sum(slabs) + (modulation if placement.modulation else 0),
        )


@dataclass(frozen=True)
class Placed:
    """Bytes on the device, of its ring of streamed blocks, and in (pinned) host memory."""

    device: int
    ring: int
    host: int


def weights_of(
    config: TransformerConfig,
    *,
    itemsize: int,
    linear: LinearBytes | None = None,
    restored: Callable[[int], int] | None = None,
    kept: int | None = None,
) -> Weights:
    """Counted on a model of one block of each kind, on the meta device.

    itemsize: bytes of a number in the compute type; linear: for the blocks' linears if they are kept in another, and
    restored the numbers in the compute type that are there while a weight of so many is used; kept: bytes of a number of
    modulation's weights.
    """
    with torch.device("meta"):
        model = Transformer(replace(config, double_blocks=1, single_blocks=1))
    inside = {parameter for block in model.blocks() for parameter in block.parameters()}
    widest = max(p.numel() for block in model.blocks() for p in _linears(block).values())
    return Weights(
        config,
        *(_block_bytes(block, itemsize, linear, kept or itemsize) for block in model.blocks()),
        outer=sum(p.numel() for p in model.parameters() if p not in inside) * itemsize,
        scratch=restored(widest) * itemsize if restored else 0,
    )


def _block_bytes(block: nn.Module, itemsize: int, linear: LinearBytes | None, kept: int) -> BlockBytes:
    modulation = {p for m in block.modules() if isinstance(m, Modulation) for p in m.parameters()}
    quantised = set(_linears(block).values()) if linear else set()
    sizes = [
        linear(*p.shape) if linear and p in quantised else p.numel() * itemsize
        for p in block.parameters()
        if p not in modulation
    ]
    return BlockBytes(
        weights=sum(sizes),
        slab=sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes),
        modulation=sum(p.numel() * (kept if p.ndim == 2 else itemsize) for p in modulation),
    )


def _linears(block: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of the linears that work on tokens: those that quantisation takes."""
    ahead = {part for m in block.modules() if isinstance(m, Modulation) for part in m.modules()}
    return {
        name: module.weight
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and module not in ahead
    }
