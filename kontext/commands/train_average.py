"""The moving average of the weights (`--ema-decay`): when there is one, and how it is saved."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch.optim import Optimizer

from kontext.errors import UserError
from kontext.options.train import Train
from kontext.training.average import Average, beside
from kontext.training.export import Export
from kontext.training.loop import Updates
from kontext.training.writer import Job


def check(options: Train, optimizer: type[Optimizer]) -> None:
    """Raises UserError for an average beside an optimizer that makes one itself."""
    if options.ema_decay is not None and hasattr(optimizer, "eval"):
        raise UserError(
            f"--ema-decay: {options.optimizer_type} averages its weights itself, and that average is what is saved. "
            "Leave out --ema-decay."
        )


def average(options: Train, updates: Updates) -> Average | None:
    """The average that is asked for, if `check` lets it."""
    return None if options.ema_decay is None else Average(updates.parameters, options.ema_decay)


def both(export: Export, average: Average | None) -> Callable[[Path, int], Job]:
    """What copies the adapter, and the average beside it if there is one, for a job that writes them."""
    if average is None:
        return export
    fields = {**export.fields, "ss_ema_decay": str(average.decay)}
    averaged = replace(export, fields=fields, weights=average.weights)

    def copy(path: Path, done: int) -> Job:
        jobs = export(path, done), averaged(beside(path), done)

        def write() -> None:
            for job in jobs:
                job()

        return write

    return copy
