"""What a run will have written by its end, before it begins."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from kontext.training.plan import Plan
from kontext.training.saving import Keep, SaveRules

What = Literal["adapter", "state"]
By = Literal["step", "epoch"]
Save = tuple[What, By, int]
"""Something saved, and the step or epoch in its name."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of one adapter file, with the average beside it if there is one, and of one state."""

    adapter: int
    state: int

    def of(self, saves: Iterable[Save]) -> int:
        return sum(self.adapter if what == "adapter" else self.state for what, _, _ in saves)


@dataclass(frozen=True)
class Forecast:
    """How many adapters and states are written, the last of the run among them, and the most bytes that lie there."""

    adapters: int
    states: int
    bytes: int


def forecast(rules: SaveRules, plan: Plan, sizes: Sizes, *, first: int = 0, best: bool = False) -> Forecast:
    """The saves of steps `first` to the end; each is written before older ones are deleted.

    best: whether the adapter of the lowest validation loss is kept too. While it is replaced there are two of it.
    """
    there: set[Save] = set()
    written, most = [], 0
    for step in range(first, plan.steps):
        new = _saves(rules, plan, step)
        written += new
        there |= set(new)
        most = max(most, sizes.of(there))
        there = {save for save in there if not _too_old(save, new, rules)}
    last: list[Save] = [("adapter", "step", plan.steps)]
    last += [("state", "step", plan.steps)] if rules.with_state or rules.state_at_end else []
    written += last
    most = max(most, sizes.of([*there, *last])) + (2 * sizes.adapter if best else 0)
    kinds = [what for what, _, _ in written]
    return Forecast(kinds.count("adapter"), kinds.count("state"), most)


def _saves(rules: SaveRules, plan: Plan, step: int) -> list[Save]:
    """What is saved after step `step`, counted from 0: no state by step where there is one by epoch."""
    due: list[tuple[By, int]] = [("step", step + 1)] if rules.at_step(step) else []
    due += [("epoch", plan.epoch(step) + 1)] if rules.at_epoch(step, plan) else []
    states = due[-1:] if rules.with_state else []
    return [("adapter", *save) for save in due] + [("state", *save) for save in states]


def _too_old(save: Save, new: list[Save], rules: SaveRules) -> bool:
    """Whether the rules delete a save once `new` ones are there."""
    what, by, number = save
    keep: Keep = rules.adapters if what == "adapter" else rules.states
    latest = next((n for _, kind, n in new if kind == by), None)
    if latest is None:
        return False
    if by == "step":
        return bool(keep.steps) and number < latest - keep.steps
    return bool(keep.epochs) and number <= latest - keep.epochs * (rules.every_epochs or 1)
