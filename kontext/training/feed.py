"""From the order of batches to what a step computes with: loaded, noise drawn, on the device, ahead of time."""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from types import FrameType
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kontext.data.batches import Batch
from kontext.errors import UserError
from kontext.timesteps import stratified
from kontext.training.example import Example, Parcel, pack
from kontext.training.plan import Plan
from kontext.training.seeds import draw_noise, draw_uniform, generator_of

Place = tuple[int, int]
"""(step, index of the batch within its epoch)."""

WINDOW = 8
"""Examples that a worker hands over together: 30 MB of FLUX's. Handing over costs a millisecond, however few they are."""

SECONDS_AFTER_SIGTERM = 300


class Batches(Protocol):
    """The dataset as training sees it."""

    def sizes(self, epoch: int) -> list[int]:
        """Items in each batch of an epoch, in its order."""

    def load(self, epoch: int, index: int) -> Batch:
        """A batch of an epoch, from the caches."""


@dataclass(frozen=True)
class Epoch:
    """What holds for all batches of an epoch: their sizes, the items before each, and uniform numbers if stratified."""

    number: int
    sizes: list[int]
    starts: list[int]
    pool: Tensor | None


class Examples(Dataset[Parcel]):
    """Examples by place. A worker process holds a copy; nothing in it changes but a memory of the last epoch."""

    def __init__(self, batches: Batches, plan: Plan, *, seed: int, buckets: int | None = None) -> None:
        self.batches = batches
        self.plan = plan
        self.seed = seed
        self.buckets = buckets
        self._memory: Epoch | None = None

    def __getitem__(self, window: Sequence[Place]) -> Parcel:
        """The examples of some places. An error goes along: raised in a worker, it would arrive buried in a traceback."""
        examples: list[Example] = []
        try:
            for place in window:
                examples.append(self.example(*place))
        except UserError as error:
            return pack(examples, error)
        return pack(examples)

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
    persistent: bool = True,
) -> Iterator[Example]:
    """Examples of process `rank` from `first_step` to the end, loaded by `workers` processes; together: see `places`.

    They are on the host, in memory from which `device` copies without waiting. persistent: the processes live through
    all epochs, instead of beginning anew with each.
    """
    taken = places(examples.plan, first_step=first_step, rank=rank, together=together)
    epochs = groupby(taken, key=lambda place: 0 if persistent else examples.plan.epoch(place[0]))
    window = WINDOW if workers else 1
    for _, group in epochs:
        part = list(group)
        loader: DataLoader[Parcel] = DataLoader(
            examples,
            batch_size=None,
            sampler=[part[start : start + window] for start in range(0, len(part), window)],
            num_workers=workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=_outlive_interrupts,
        )
        for parcel in loader:
            yield from parcel.open()


def _outlive_interrupts(worker: int) -> None:
    """Ctrl-C and SIGTERM reach workers too when they go to all processes of a run, as torchrun, systemd and Slurm send
    them, but it is for the main process to stop, after a step that may need more examples.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)


def _end_later(number: int, frame: FrameType | None) -> None:
    """At the next SIGTERM, and in any case after some time: who sent this one may be waiting for the end."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.alarm(SECONDS_AFTER_SIGTERM)
