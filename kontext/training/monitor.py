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
SECONDS_BETWEEN_LOOKS = 0.25  # at the memory, which may take longer to ask for than a small step
LEAST_SCALE = 1.0  # below this a loss scale no longer lifts gradients into float16's range
COLLAPSED_STEPS = 10  # with a scale so small, before the run is given up
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


class Gauge:
    """Speed and memory of the run, looked at a few times a second."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.since = time.perf_counter()
        self.items = 0
        self.speed, self.memory = 0.0, 0.0

    def add(self, items: int) -> None:
        """Items that were trained on since the last time."""
        self.items += items

    def due(self) -> bool:
        """Whether it is time to look again; the first time it always is."""
        return not self.memory or time.perf_counter() - self.since >= SECONDS_BETWEEN_LOOKS

    def look(self) -> None:
        """Takes images/s since the last look, and the memory in use in GB."""
        now = time.perf_counter()
        self.speed, self.memory = (
            self.items / max(now - self.since, 1e-9),
            memory_used(self.device) / GIGABYTE,
        )
        self.since, self.items = now, 0


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
        log: Log | None,
        record: Record,
        last_state: Callable[[], Path | None],
        notes: Mapping[str, Any],
        measures: Callable[[], Mapping[str, float]],
        scale: Callable[[], float] | None = None,
    ) -> None:
        """measures: of the weights as they are now, for the logs.

        scale: of the loss, if it is scaled for float16, where a step with an infinite gradient is left out and harmless.
        """
        self.plan = plan
        self.team = team
        self.progress = progress
        self.log = log
        self.record = record
        self.last_state = last_state
        self.measures = measures
        self.scale = scale
        self.collapsed = 0
        self.smoothed = Smoothed(**notes)
        self.pending: list[Outcome] = []
        self.unshown: list[Outcome] = []
        self.gauge = Gauge(team.device)
        self.validation = ""

    @property
    def notes(self) -> dict[str, float]:
        """What a resumed run needs to show the same smoothed loss."""
        return {"total": self.smoothed.total, "weight": self.smoothed.weight}

    def __call__(self, outcome: Outcome) -> None:
        self.pending.append(outcome)
        if self.team.device.type != "cuda" or len(self.pending) == STEPS_BETWEEN_READS:
            self._read()
            if self.gauge.due():
                self._show()

    def validated(self, done: int, loss: float) -> None:
        """Logs and shows a validation loss after `done` steps."""
        self.flush()
        if self.log:
            self.log({"loss/validation": loss}, done)
        self.validation = f"validation {loss:.4f}  "

    def flush(self) -> None:
        """Reads and shows what has not been read yet.

        Raises UserError at a loss or a gradient that is NaN or infinite, naming the step, the items and their noise
        levels, and when the loss scale has collapsed.
        """
        self._read()
        if self.unshown:
            self._show()

    def _read(self) -> None:
        if not self.pending:
            return
        outcomes, self.pending = self.pending, []
        losses = self.team.sum(torch.stack([outcome.loss for outcome in outcomes])).tolist()
        outcomes = self._of_all(outcomes)
        self.gauge.add(sum(len(seen.keys) for outcome in outcomes for seen in outcome.seen))
        for outcome, loss in zip(outcomes, losses, strict=True):
            norm = outcome.norm.item()
            if not math.isfinite(loss):
                raise UserError(self._breakdown(outcome, f"loss became {loss}"))
            if not (math.isfinite(norm) or self.scale):
                raise UserError(self._breakdown(outcome, f"gradient became {norm}"))
            self._record(outcome, loss, norm, last=outcome is outcomes[-1])
        self._watch_scale(outcomes)
        self.unshown += outcomes

    def _watch_scale(self, outcomes: list[Outcome]) -> None:
        """A step whose gradients overflow float16 is left out and halves the scale. When that has no end, no step counts."""
        if self.scale is None:
            return
        scale = self.scale()
        self.collapsed = self.collapsed + len(outcomes) if scale < LEAST_SCALE else 0
        if self.collapsed >= COLLAPSED_STEPS:
            raise UserError(
                f"The loss scale of float16 has fallen to {scale:.2g} by step {outcomes[-1].step + 1}: gradients overflow "
                f"even so, and such steps are left out. {self._way_back()}, with --dtype bfloat16 or float32."
            )

    def _of_all(self, outcomes: list[Outcome]) -> list[Outcome]:
        """The same with the items that the other processes have seen."""
        if self.team.size == 1:
            return outcomes
        parts = self.team.gather([[seen.on_host() for seen in outcome.seen] for outcome in outcomes])
        return [
            replace(outcome, seen=tuple(chain(*seen)))
            for outcome, *seen in zip(outcomes, *parts, strict=True)
        ]

    def _record(self, outcome: Outcome, loss: float, norm: float, *, last: bool) -> None:
        average = self.smoothed.add(loss)
        self.record(outcome, loss, norm)
        if self.log:
            values = {"loss/current": loss, "loss/average": average, "grad_norm": norm}
            values |= {f"lr/group{i}": rate for i, rate in enumerate(outcome.rates)}
            self.log(values | (self._state() if last else {}), outcome.step + 1)

    def _state(self) -> dict[str, float]:
        """What is known of now alone, and not of steps that are read late."""
        values = dict(self.measures())
        if self.gauge.memory:
            values |= {"images_per_second": self.gauge.speed, "memory_gb": self.gauge.memory}
        return values | ({"loss_scale": self.scale()} if self.scale else {})

    def _show(self) -> None:
        self.gauge.look()
        last, speed, memory = self.unshown[-1], self.gauge.speed, self.gauge.memory
        self.progress.advance(
            len(self.unshown),
            f"epoch {self.plan.epoch(last.step) + 1}/{self.plan.epochs}  loss {self.smoothed.value:.4f}  "
            f"{self.validation}lr {last.rates[0]:.2e}  {speed:.3g} images/s  {memory:.1f} GB",
        )
        self.unshown = []

    def _breakdown(self, outcome: Outcome, what: str) -> str:
        seen = [item for part in outcome.seen for item in part.items()]
        bad = [item for item in seen if not math.isfinite(item.loss)] or seen
        named = ", ".join(f"{item.key} (timestep {1000 * item.t:.0f})" for item in bad)
        return (
            f"The {what} at step {outcome.step + 1}, with {named}. "
            f"Nothing was saved since. {self._way_back()}, with a lower --learning-rate, or --dtype bfloat16 if it was "
            "float16."
        )

    def _way_back(self) -> str:
        state = self.last_state()
        return (
            f"Go back with --resume {state}"
            if state
            else "No state was saved (see --save-state): start again"
        )
