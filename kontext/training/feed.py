"""From the order of batches to what a step computes with: loaded, noise drawn, on the device, ahead of time."""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kontext.data.batches import Batch
from kontext.errors import UserError
from kontext.timesteps import stratified
from kontext.training.plan import Plan
from kontext.training.seeds import draw_noise, draw_uniform, generator_of

Place = tuple[int, int]
"""(step, index of the batch within its epoch)."""


class Batches(Protocol):
    """The dataset as training sees it."""

    def sizes(self, epoch: int) -> list[int]:
        """Items in each batch of an epoch, in its order."""

    def load(self, epoch: int, index: int) -> Batch:
        """A batch of an epoch, from the caches."""


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

    def pin_memory(self) -> "Example":
        """What DataLoader calls, so that copies to the GPU need not be waited for."""
        return replace(self, batch=_moved(self.batch, Tensor.pin_memory), noise=self.noise.pin_memory())

    def to(self, device: torch.device) -> "Example":
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(self, batch=_moved(self.batch, move), noise=move(self.noise))


def _moved(batch: Batch, move: Callable[[Tensor], Tensor]) -> Batch:
    return replace(
        batch,
        latents=move(batch.latents),
        references=tuple(move(reference) for reference in batch.references),
        txt=move(batch.txt),
        vector=move(batch.vector),
        masks=None if batch.masks is None else move(batch.masks),
    )


@dataclass(frozen=True)
class Epoch:
    """What holds for all batches of an epoch: their sizes, the items before each, and uniform numbers if stratified."""

    number: int
    sizes: list[int]
    starts: list[int]
    pool: Tensor | None


class Examples(Dataset["Example | UserError"]):
    """Examples by place. A worker process holds a copy; nothing in it changes but a memory of the last epoch."""

    def __init__(self, batches: Batches, plan: Plan, *, seed: int, buckets: int | None = None) -> None:
        self.batches = batches
        self.plan = plan
        self.seed = seed
        self.buckets = buckets
        self._memory: Epoch | None = None

    def __getitem__(self, place: Place) -> "Example | UserError":
        """The example, or what is wrong: raised in a worker, the message would arrive buried in a traceback."""
        try:
            return self.example(*place)
        except UserError as error:
            return error

    def example(self, step: int, index: int) -> Example:
        """Raises UserError when the caches have gone."""
        epoch = self._epoch(self.plan.epoch(step))
        batch = self.batches.load(epoch.number, index)
        return Example(
            epoch=epoch.number,
            index=index,
            share=epoch.sizes[index] / sum(epoch.sizes[i] for i in self.plan.group(step)),
            batch=batch,
            noise=draw_noise(tuple(batch.latents.shape), self.seed, epoch.number, index),
            u=self._uniform(epoch, index),
        )

    def _epoch(self, number: int) -> Epoch:
        if self._memory is None or self._memory.number != number:
            sizes = self.batches.sizes(number)
            starts = [0, *accumulate(sizes)]
            pool = None
            if self.buckets:
                pool = stratified(starts[-1], self.buckets, generator_of("stratified", self.seed, number))
            self._memory = Epoch(number, sizes, starts, pool)
        return self._memory

    def _uniform(self, epoch: Epoch, index: int) -> Tensor:
        if epoch.pool is None:
            return draw_uniform(epoch.sizes[index], self.seed, epoch.number, index)
        return epoch.pool[epoch.starts[index] : epoch.starts[index + 1]]


def places(plan: Plan, *, first_step: int, rank: int, together: bool = False) -> list[Place]:
    """The batches that process `rank` takes from `first_step` to the end: every `processes`th of each step.

    together: every process takes as many; the step's first batch stands where there is none left.
    """
    found = []
    for step in range(first_step, plan.steps):
        group = plan.group(step)
        mine = list(group[rank :: plan.processes])
        if together:
            mine += [group[0]] * (plan.rounds(step) - len(mine))
        found += [(step, index) for index in mine]
    return found


def feed(
    examples: Examples,
    *,
    first_step: int,
    rank: int,
    workers: int,
    device: torch.device,
    together: bool = False,
) -> Iterator[Example]:
    """Examples of process `rank` from `first_step` to the end, loaded by `workers` processes; together: see `places`.

    They are on the host, in memory from which `device` copies without waiting.
    """
    loader: DataLoader[Example | UserError] = DataLoader(
        examples,
        batch_size=None,
        sampler=places(examples.plan, first_step=first_step, rank=rank, together=together),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_heed_no_interrupts,
    )
    for example in loader:
        if isinstance(example, UserError):
            raise example
        yield example


def _heed_no_interrupts(worker: int) -> None:
    """Ctrl-C reaches workers too, but it is for the main process to decide when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
