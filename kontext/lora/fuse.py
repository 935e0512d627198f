"""Several low-rank changes of one weight as a single one, exactly."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kontext.lora.deltas import Delta, LowRank


def fuse(deltas: Sequence[Delta], rows: int, strengths: Sequence[float] | None = None) -> LowRank | None:
    """The sum of strength * dW over `deltas`, for a weight of `rows` outputs; None if one is not low-rank.

    A single change of all rows keeps its factors. Else ranks add up: the downs are stacked, and each up, with
    scale and strength in it, fills its own columns in its target's rows; changes that share one down (a fused
    LoRA that was split) keep its rank. float32.
    """
    changes = [d.change for d in deltas]
    if not all(isinstance(c, LowRank) for c in changes):
        return None
    strengths = strengths or [1.0] * len(deltas)
    if len(deltas) == 1 and changes[0].shape[0] == rows:
        return LowRank(changes[0].down, changes[0].up, strengths[0] * changes[0].scale)
    shared = all(_same(c.down, changes[0].down) for c in changes)
    rank = changes[0].rank if shared else sum(c.rank for c in changes)
    up = torch.zeros(rows, rank)
    column = 0
    for delta, change, strength in zip(deltas, changes, strengths, strict=True):
        block = up[delta.target.start : delta.target.stop, column : column + change.rank]
        block += strength * change.scale * change.up.float()
        column += 0 if shared else change.rank
    down = changes[0].down if shared else torch.cat([c.down.float() for c in changes])
    return LowRank(down.float(), up, 1.0)


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a, b))
