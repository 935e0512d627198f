"""Writing the adapter with all that is known about it, while training goes on."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kontext import console
from kontext.files import save_tensors
from kontext.lora.files import kohya_tensors
from kontext.lora.linear import AdapterLinear
from kontext.training.metadata import Facts, at_save, hashes, network_fields
from kontext.training.plan import Plan
from kontext.training.writer import Job


@dataclass(frozen=True)
class Export:
    """Writes adapter files: `modules` in `dtype`, with their training fields (or few of them) and the modelspec's.

    weights: within it the adapter has the weights to be used.
    """

    modules: Mapping[str, AdapterLinear]
    dtype: torch.dtype
    facts: Facts
    fields: Mapping[str, str]
    spec: Mapping[str, str]
    brief: bool
    plan: Plan
    weights: Callable[[], AbstractContextManager[None]]

    def __call__(self, path: Path, done: int) -> Job:
        """Copies the adapter as it is after `done` steps; the job writes it."""
        with self.weights():
            tensors = kohya_tensors(self.modules, self.dtype)
        epoch = self.plan.epoch(done - 1) + 1
        fields = {**self.fields, **at_save(self.facts, step=done, epoch=epoch, now=time.time())}
        kept = network_fields(fields) if self.brief else fields
        return partial(_write, path, tensors, kept, self.spec)


def _write(
    path: Path, tensors: Mapping[str, Tensor], fields: Mapping[str, str], spec: Mapping[str, str]
) -> None:
    save_tensors(path, tensors, {**fields, **spec, **hashes(tensors, fields)})
    console.say(f"Saved {path}")
