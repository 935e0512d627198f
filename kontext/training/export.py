"""Writing what is trained with all that is known about it, while training goes on."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from kontext.training.metadata import Facts, at_save, network_fields
from kontext.training.plan import Plan
from kontext.training.trained import Trained
from kontext.training.writer import Job


@dataclass(frozen=True)
class Export:
    """Writes files of what is trained, with their training fields (or few of them) and the modelspec's.

    weights: within it what is trained has the weights to be used.
    """

    trained: Trained
    facts: Facts
    fields: Mapping[str, str]
    spec: Mapping[str, str]
    brief: bool
    plan: Plan
    weights: Callable[[], AbstractContextManager[None]]

    def __call__(self, path: Path, done: int) -> Job:
        """Copies the weights as they are after `done` steps; the job writes them."""
        epoch = self.plan.epoch(done - 1) + 1
        fields = {**self.fields, **at_save(self.facts, step=done, epoch=epoch, now=time.time())}
        kept = network_fields(fields) if self.brief else fields
        with self.weights():
            return self.trained.copy(path, kept, self.spec)
