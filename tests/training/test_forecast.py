"""What a run will write, against the saver itself at work on empty files."""

from pathlib import Path

import pytest
import torch

from kontext.training.forecast import Forecast, Sizes, forecast
from kontext.training.loop import Outcome
from kontext.training.names import Names
from kontext.training.plan import Plan
from kontext.training.saving import Keep, Saver, SaveRules

PLAN = Plan(batches=5, accumulation=1, processes=1, steps=23)
RULES = [
    SaveRules(),
    SaveRules(every_epochs=1, with_state=True),
    SaveRules(every_epochs=2, adapters=Keep(epochs=1), states=Keep(epochs=1), with_state=True),
    SaveRules(every_steps=3, adapters=Keep(steps=6), states=Keep(steps=3), with_state=True),
    SaveRules(every_steps=5, every_epochs=1, adapters=Keep(2, 5), state_at_end=True),
    SaveRules(every_steps=5, every_epochs=1, states=Keep(2, 5), with_state=True),
]


def really_written(folder: Path, rules: SaveRules, first: int) -> tuple[int, int, int]:
    """Adapters and states that the saver writes, and the most bytes after a write, an adapter being 10 and a state 7."""
    written, most = {"adapter": 0, "state": 0}, 0

    def write(path: Path, done: int) -> None:
        nonlocal most
        kind = "state" if path.name.endswith("-state") else "adapter"
        path.mkdir() if kind == "state" else path.touch()
        written[kind] += 1
        there = [10 if path.is_file() else 7 for path in folder.iterdir()]
        most = max(most, sum(there))

    saver = Saver(
        Names(folder, "edit"), rules, PLAN, write_adapter=write, write_state=write, later=lambda job: job()
    )
    for step in range(first, PLAN.steps):
        saver(Outcome(step, torch.zeros(()), torch.zeros(()), (), ()))
    saver.finish()
    return written["adapter"], written["state"], most


@pytest.mark.parametrize("first", [0, 7])
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_as_the_saver_does(tmp_path, rules, first):
    assert forecast(rules, PLAN, Sizes(10, 7), first=first) == Forecast(
        *really_written(tmp_path, rules, first)
    )


def test_the_best_adapter_is_there_twice_while_it_is_replaced():
    plain, best = (forecast(SaveRules(), PLAN, Sizes(10, 7), best=best) for best in (False, True))
    assert (plain.bytes, best.bytes) == (10, 30)
