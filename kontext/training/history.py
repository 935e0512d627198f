"""What a run has recorded, in `<name>.history.jsonl`: a JSON object per line, in the order in which things happened.

Every line has `step`, the number of steps that were done. Besides it:
- `loss`, `norm` (of the gradients, before clipping), `rates` (per parameter group), `time` (seconds since 1970) and
  `items` (noise level and loss of each) after a step;
- `validation`: a loss;
- `label` and `pictures`: names of the sample pictures made then;
- `begun`: when training began, or went on, in seconds since 1970.

Nothing here changes training. Lines are written every few seconds, so that a step does not wait for the disk.
"""

import json
import math
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kontext.files import atomic_write
from kontext.training.loop import Outcome

SECONDS_BETWEEN_WRITES = 3.0
ENCODER = json.JSONEncoder(separators=(",", ":"))


@dataclass(frozen=True)
class Validation:
    """The loss on the validation items after `step` steps."""

    step: int
    loss: float


@dataclass(frozen=True)
class SampleSet:
    """The sample pictures made after `step` steps, by file name, in the order of the prompts."""

    step: int
    label: str
    pictures: tuple[str, ...]


@dataclass(frozen=True)
class Sitting:
    """From one start or resumption to the next: its first row among the steps, and when it began."""

    row: int
    time: float


@dataclass(frozen=True, eq=False)
class History:
    """N steps with M items: `step`, `loss`, `norm`, `time` (N,), `rates` (N, groups), `levels`, `item_losses` (M,).

    Steps are counted from 1, times are in seconds since 1970. What was not finite is NaN.
    """

    step: np.ndarray
    loss: np.ndarray
    norm: np.ndarray
    time: np.ndarray
    rates: np.ndarray
    levels: np.ndarray
    item_losses: np.ndarray
    validation: tuple[Validation, ...]
    samples: tuple[SampleSet, ...]
    sittings: tuple[Sitting, ...]

    @property
    def seconds(self) -> float:
        """How long training went on, pauses between an end and a resumption left out."""
        ends = [sitting.row for sitting in self.sittings[1:]] + [len(self.time)]
        spans = [
            self.time[end - 1] - sitting.time
            for sitting, end in zip(self.sittings, ends, strict=False)
            if end > sitting.row
        ]
        return float(sum(spans))


class _Columns:
    """The history as it grows, in columns of plain numbers: 100,000 steps take a few megabytes."""

    def __init__(self) -> None:
        self.step = array("q")
        self.loss, self.norm, self.time, self.rates = array("d"), array("d"), array("d"), array("d")
        self.levels, self.item_losses = array("d"), array("d")
        self.validation: list[Validation] = []
        self.samples: list[SampleSet] = []
        self.sittings: list[Sitting] = []

    def add(self, line: dict[str, Any]) -> None:
        """Takes in a line of the file. Raises KeyError, TypeError or ValueError if it is not one."""
        step = line["step"]
        if "loss" in line:
            self._add_step(step, line)
        elif "validation" in line:
            self.validation.append(Validation(step, _number(line["validation"])))
        elif "pictures" in line:
            self.samples.append(SampleSet(step, line["label"], tuple(line["pictures"])))
        else:
            self.sittings.append(Sitting(len(self.step), float(line["begun"])))

    def _add_step(self, step: int, line: dict[str, Any]) -> None:
        loss, norm, moment = _number(line["loss"]), _number(line["norm"]), float(line["time"])
        levels = array("d", [float(level) for level, _ in line["items"]])
        losses = array("d", [_number(loss) for _, loss in line["items"]])
        rates = array("d", line["rates"])
        if self.step and len(rates) * len(self.step) != len(self.rates):
            raise ValueError("another number of parameter groups: a line of another run")
        self.step.append(step)
        self.loss.append(loss)
        self.norm.append(norm)
        self.time.append(moment)
        self.rates.extend(rates)
        self.levels.extend(levels)
        self.item_losses.extend(losses)

    def history(self) -> History:
        """What has been taken in so far; later additions do not change it."""
        steps = len(self.step)
        return History(
            step=np.array(self.step),
            loss=np.array(self.loss),
            norm=np.array(self.norm),
            time=np.array(self.time),
            rates=np.array(self.rates).reshape(steps, len(self.rates) // max(steps, 1)),
            levels=np.array(self.levels),
            item_losses=np.array(self.item_losses),
            validation=tuple(self.validation),
            samples=tuple(self.samples),
            sittings=tuple(self.sittings),
        )


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _plain(value: float) -> float | None:
    """`value` in 9 digits, which tell any two float32 apart; JSON has no NaN and no infinity."""
    return float(f"{value:.9g}") if math.isfinite(value) else None


def _read(path: Path, until: float) -> tuple[_Columns, list[str]]:
    """What the file says of the first `until` steps, and its lines that say so. Torn lines say nothing."""
    columns, lines = _Columns(), []
    if not path.is_file():
        return columns, lines
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                values = json.loads(line)
                if values["step"] <= until:
                    columns.add(values)
                    lines.append(line.rstrip("\n") + "\n")
            except (ValueError, KeyError, TypeError):
                continue
    return columns, lines


def read_history(path: Path) -> History:
    """The history in the file, an empty one if there is none. Lines that a killed run left unfinished are ignored."""
    return _read(path, math.inf)[0].history()


class Recorder:
    """Writes the history of a run that goes on after `done` steps; what is told of later steps is dropped."""

    def __init__(self, path: Path, *, done: int) -> None:
        """Raises UserError if the file cannot be written."""
        self._columns, self._waiting = _read(path, done) if done else (_Columns(), [])
        with atomic_write(path) as temporary:
            temporary.write_text("".join(self._waiting), encoding="utf-8")
        self._waiting = []
        self._path = path
        self._written_at = time.monotonic()
        self._add({"step": done, "begun": round(time.time(), 3)})

    @property
    def history(self) -> History:
        """What is recorded so far, written or not."""
        return self._columns.history()

    def step(self, outcome: Outcome, loss: float, norm: float) -> None:
        """After a step: its loss and gradient norm, which have been read from the device, and its items."""
        pairs = [
            [_plain(level), _plain(own)]
            for seen in outcome.seen
            for level, own in zip(seen.t.tolist(), seen.own_losses, strict=True)
        ]
        self._add(
            {
                "step": outcome.step + 1,
                "loss": _plain(loss),
                "norm": _plain(norm),
                "rates": [_plain(rate) for rate in outcome.rates],
                "time": round(time.time(), 3),
                "items": pairs,
            }
        )

    def validation(self, done: int, loss: float) -> None:
        """A validation loss after `done` steps."""
        self._add({"step": done, "validation": _plain(loss)})

    def samples(self, done: int, label: str, pictures: Sequence[str]) -> None:
        """Sample pictures made after `done` steps, by file name."""
        self._add({"step": done, "label": label, "pictures": list(pictures)})

    def _add(self, line: dict[str, Any]) -> None:
        self._columns.add(line)
        self._waiting.append(ENCODER.encode(line) + "\n")
        if time.monotonic() - self._written_at > SECONDS_BETWEEN_WRITES:
            self.flush()

    def flush(self) -> None:
        """Writes what has not been written yet. Raises OSError when the disk does not take it."""
        with open(self._path, "a", encoding="utf-8") as file:
            file.write("".join(self._waiting))
        self._waiting = []
        self._written_at = time.monotonic()
