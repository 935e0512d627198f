"""The processes that `accelerate launch` or `torchrun` has started, for work that is dealt out: caching, generation.

What they tell each other is small, but one may wait for hours until the others are done: they talk over gloo, on GPUs
too, whose own collectives give up after minutes. Training, which talks in every step, has `kontext.training.team`.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from kontext.errors import UserError

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long one waits for another that neither answers nor has ended."""


@dataclass(frozen=True)
class Processes:
    """This process among `size`, counted from 0; `here` of them run on this machine.

    `first` and `gather` are called by all at the same point.
    """

    rank: int = 0
    size: int = 1
    here: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that speaks and cleans up."""
        return self.rank == 0

    def share(self, values: Sequence[T]) -> list[T]:
        """What this process has to do of `values`: every `size`th."""
        return list(values[self.rank :: self.size])

    def first(self, compute: Callable[[], T]) -> T:
        """The first process computes, and all get the result. When it fails, the others end without a word."""
        if self.size == 1:
            return compute()
        box: list[Any] = [None]
        try:
            if self.leads:
                box = [(compute(),)]
        finally:
            _together(lambda: dist.broadcast_object_list(box))
        if box[0] is None:
            raise SystemExit(2)
        return box[0][0]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in their order. Raises UserError when one of them has ended before."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        _together(lambda: dist.all_gather_object(values, value))
        return values


ALONE = Processes()


def _together(talk: Callable[[], None]) -> None:
    try:
        talk()
    except RuntimeError as error:
        raise UserError("Another process has ended before its work was done; see its own message.") from error


def local_rank() -> int | None:
    """The number of this process on its machine, None when there is only one process in all."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        return None
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def joined() -> Iterator[Processes]:
    """All processes of the launch, connected; a program that was started by hand is alone."""
    if local_rank() is None:
        yield ALONE
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        size = dist.get_world_size()
        yield Processes(dist.get_rank(), size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    finally:
        dist.destroy_process_group()
