"""What a person sees of a run: the live line, the logs, and the end when a loss is no number."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from kontext import console
from kontext.device import memory_used
from kontext.errors import UserError
from kontext.training.loop import Outcome
from kontext.training.plan import Plan
from kontext.training.team import Team

SMOOTHING = 0.98
STEPS_BETWEEN_READS = 10  # on a GPU, where reading a loss waits for all work queued before it
GIGABYTE = 1e9

Log = Callable[[Mapping[str, float], int], None]
"""Called with named values and the number of steps that are done."""

Record = Callable[[Outcome, float, float], None]
"""Called with what a step did, its loss and its gradient norm."""


@dataclass
class Smoothed:
    """Exponential moving average, corrected for its start."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float) -> float:
        self.total = SMOOTHING * self.total + (1 - SMOOTHING) * value
        self.weight = SMOOTHING * self.weight + (1 - SMOOTHING)
        return self.value

    @property
    def value(self) -> float:
        return self.total / self.weight if self.weight else 0.0


class Monitor:
    """Listens to the loop. Outcomes are read some steps late on a GPU, so that the loop does not wait for them.

    last_state: asks for the state to go back to, for the message when training breaks down.
    """

    def __init__(
        self,
        plan: Plan,
        team: Team,
        progress: console.Progress,
        *,
        log: Log,
        record: Record,
        last_state: Callable[[], Path | None],
        notes: Mapping[str, Any],
        scaled: bool = False,
    ) -> None:
        """scaled: the loss is scaled for float16, where a step with an infinite gradient is left out and harmless."""
        self.plan = plan
        self.team = team
        self.progress = progress
        self.log = log
        self.record = record
        self.last_state = last_state
        self.scaled = scaled
        self.smoothed = Smoothed(**notes)
        self.pending: list[Outcome] = []
        self.read_at = time.perf_counter()
        self.validation = ""

    @property
    def notes(self) -> dict[str, float]:
        """What a resumed run needs to show the same smoothed loss."""
        return {"total": self.smoothed.total, "weight": self.smoothed.weight}

    def __call__(self, outcome: Outcome) -> None:
        self.pending.append(outcome)
        if self.team.device.type != "cuda" or len(self.pending) == STEPS_BETWEEN_READS:
            self.flush()

    def validated(self, done: int, loss: float) -> None:
        """Logs and shows a validation loss after `done` steps."""
        self.flush()
        self.log({"loss/validation": loss}, done)
        self.validation = f"validation {loss:.4f}  "

    def flush(self) -> None:
        """Reads what has not been read yet.

        Raises UserError at a loss or a gradient that is NaN or infinite, naming the step, the items and their noise levels.
        """
        if not self.pending:
            return
        outcomes, self.pending = self.pending, []
        losses = self.team.sum(torch.stack([outcome.loss for outcome in outcomes])).tolist()
        outcomes = self._of_all(outcomes)
        for outcome, loss in zip(outcomes, losses, strict=True):
            norm = outcome.norm.item()
            if not math.isfinite(loss):
                raise UserError(self._breakdown(outcome, f"loss became {loss}"))
            if not (math.isfinite(norm) or self.scaled):
                raise UserError(self._breakdown(outcome, f"gradient became {norm}"))
            self._record(outcome, loss, norm)
        self._show(outcomes)

    def _of_all(self, outcomes: list[Outcome]) -> list[Outcome]:
        """The same with the items that the other processes have seen."""
        if self.team.size == 1:
            return outcomes
        parts = self.team.gather([[seen.on_host() for seen in outcome.seen] for outcome in outcomes])
        return [
            replace(outcome, seen=tuple(chain(*seen)))
            for outcome, *seen in zip(outcomes, *parts, strict=True)
        ]

    def _record(self, outcome: Outcome, loss: float, norm: float) -> None:
        values = {"loss/current": loss, "loss/average": self.smoothed.add(loss), "grad_norm": norm}
        values |= {f"lr/group{i}": rate for i, rate in enumerate(outcome.rates)}
        self.log(values, outcome.step + 1)
        self.record(outcome, loss, norm)

    def _show(self, outcomes: list[Outcome]) -> None:
        now = time.perf_counter()
        items = sum(len(seen.keys) for outcome in outcomes for seen in outcome.seen)
        speed = items / max(now - self.read_at, 1e-9)
        self.read_at = now
        last = outcomes[-1]
        self.progress.advance(
            len(outcomes),
            f"epoch {self.plan.epoch(last.step) + 1}/{self.plan.epochs}  loss {self.smoothed.value:.4f}  "
            f"{self.validation}lr {last.rates[0]:.2e}  {speed:.3g} images/s  {memory_used(self.team.device) / GIGABYTE:.1f} GB",
        )

    def _breakdown(self, outcome: Outcome, what: str) -> str:
        seen = [item for part in outcome.seen for item in part.items()]
        bad = [item for item in seen if not math.isfinite(item.loss)] or seen
        named = ", ".join(f"{item.key} (timestep {1000 * item.t:.0f})" for item in bad)
        state = self.last_state()
        remedy = (
            f"Go back with --resume {state}"
            if state
            else "No state was saved (see --save-state): start again"
        )
        return (
            f"The {what} at step {outcome.step + 1}, with {named}. "
            f"Nothing was saved since. {remedy}, with a lower --learning-rate, or --dtype bfloat16 if it was float16."
        )
