"""Two ways to do the same thing, measured side by side in one process.

Runs alternate, so that whatever else the machine does falls on both; what is reported is the median of the ratios of
neighbouring runs.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Run = Callable[[], object]


@dataclass(frozen=True)
class Paired:
    """Seconds of each run, in the order they ran: ours[i] next to theirs[i]."""

    ours: list[float]
    theirs: list[float]

    @property
    def ratio(self) -> float:
        """How many times as fast ours is: the median over pairs."""
        return statistics.median(b / a for a, b in zip(self.ours, self.theirs, strict=True))

    def row(self, name: str) -> str:
        ours, theirs = statistics.median(self.ours), statistics.median(self.theirs)
        return f"| {name} | {ours:.3f} s | {theirs:.3f} s | {self.ratio:.2f} |"


def paired(ours: Run, theirs: Run, *, rounds: int = 7) -> Paired:
    """Run both once to warm up, then `rounds` times in turn."""
    ours(), theirs()
    result = Paired([], [])
    for i in range(rounds):
        order = ((ours, result.ours), (theirs, result.theirs))
        for run, seconds in order if i % 2 else reversed(order):
            seconds.append(timed(run))
    return result


def timed(run: Run) -> float:
    """Seconds of one run, with the GPU's work finished."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|, in float64."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def header(title: str) -> str:
    return f"\n{title}\n\n| | kontext | peer | times as fast |\n|---|---|---|---|"
