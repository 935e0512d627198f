"""Rows of a weight, merged on their own: a few megabytes do for any size, and every core takes its share.

Fresh memory costs more time than the arithmetic, so each thread uses its own again and again.
"""

import math
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch import Tensor

from kontext.checkpoints.source import Entry
from kontext.lora.deltas import Change, Delta
from kontext.lora.merge import merge_weight
from kontext.lora.stream import Spec, Writer, read_rows

VALUES = 2**19  # of a strip on the CPU: its copies in two types stay within a core's cache, or nearly
VALUES_ON_GPU = 2**24
THREADS = 8  # more do not write faster


class _Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Strip:
    """Rows start to stop of a BFL tensor, which lie together in the old file and in the new.

    old_row, new_row: where `start` is in the tensor of the old file and of the new one.
    """

    start: int
    stop: int
    old: Entry
    old_row: int
    new: Spec
    new_row: int


class Desk(threading.local):
    """Memory that a thread uses again for every strip."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        if name not in self._memory or self._memory[name].numel() < size:
            self._memory[name] = torch.empty(size, dtype=torch.uint8)
        return self._memory[name][:size].view(dtype).view(shape)


def strips(old: Sequence[Entry], new: Sequence[Spec], values: int) -> Iterator[Strip]:
    """Cut a BFL tensor, in parts `old` and to be in parts `new`, into strips of about `values` numbers."""
    old_rows, new_rows = _first_rows(old), _first_rows(new)
    assert old_rows[-1] == new_rows[-1]
    height = max(1, values // math.prod(new[0].shape[1:]))
    for border, end in pairwise(sorted({*old_rows, *new_rows})):
        i, j = bisect_right(old_rows, border) - 1, bisect_right(new_rows, border) - 1
        for start in range(border, end, height):
            stop = min(start + height, end)
            yield Strip(start, stop, old[i], start - old_rows[i], new[j], start - new_rows[j])


def _first_rows(parts: Sequence[_Shaped]) -> list[int]:
    """The first row of every part in the whole, and the whole's height."""
    return list(accumulate((part.shape[0] for part in parts), initial=0))


def by_rows(changes: Iterable[tuple[Delta, float]]) -> bool:
    """Whether strips can be merged without the rest of their tensor."""
    return all(delta.change.rows(0, 1) is not None for delta, _ in changes)


def in_float32(changes: Iterable[tuple[Delta, float]]) -> list[tuple[Delta, float]]:
    """The same changes, cast once instead of for every strip."""
    return [(replace(delta, change=_float(delta.change)), strength) for delta, strength in changes]


def _float(change: Change) -> Change:
    return replace(change, **{k: v.float() for k, v in vars(change).items() if isinstance(v, Tensor)})


def merge_strip(
    strip: Strip, changes: Sequence[tuple[Delta, float]], writer: Writer, desk: Desk, device: torch.device
) -> None:
    """Read the strip's rows, merge what of `changes` falls on them, round once, and write them.

    Rows that stay as they are go from file to file.
    """
    within = [(delta.within(strip.start, strip.stop), strength) for delta, strength in changes]
    here = [(delta, strength) for delta, strength in within if delta]
    rows = strip.stop - strip.start
    if not here and strip.new.dtype == strip.old.dtype:
        writer.copy(strip.new.key, strip.old, row=strip.new_row, from_row=strip.old_row, rows=rows)
        return
    shape = (rows, *strip.new.shape[1:])
    assert strip.old.dtype is not None
    stored = desk.take("stored", shape, strip.old.dtype)
    read_rows(strip.old, strip.old_row, stored)
    if device.type == "cpu":
        values = desk.take("values", shape, torch.float32).copy_(stored)
    else:
        values = stored.to(device).float()  # narrow on its way over the bus, and back
    merge_weight(values, here)
    rounded = stored if strip.new.dtype == strip.old.dtype else desk.take("rounded", shape, strip.new.dtype)
    if device.type != "cpu":
        values = values.to(rounded.dtype)
    writer.put(strip.new.key, rounded.copy_(values), strip.new_row)


def in_threads(tasks: Iterable[Callable[[], object]]) -> None:
    """Do tasks in the order they are made, as many at once as there are cores; the first error is raised.

    Not many more of them are made ahead, and each works with one thread of torch's.
    """
    before = torch.get_num_threads()
    count = max(2, min(before, THREADS))
    pending: deque[Future[object]] = deque()
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for task in tasks:
            if len(pending) == 2 * count:
                pending.popleft().result()
            pending.append(pool.submit(task))
        while pending:
            pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
