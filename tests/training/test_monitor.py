from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from kontext.errors import UserError
from kontext.training.loop import Outcome, Seen
from kontext.training.monitor import Monitor, Smoothed
from kontext.training.plan import Plan
from kontext.training.team import Team


class Line:
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.counts: list[int] = []

    def advance(self, count: int = 1, note: str = "") -> None:
        self.notes.append(note)
        self.counts.append(count)


def outcome(step: int, *losses: float) -> Outcome:
    values = torch.tensor(losses)
    seen = Seen(
        tuple(f"item{i}" for i in range(len(losses))), torch.tensor([0.25] * len(losses)), values, 1.0
    )
    return Outcome(step, values.sum(), torch.tensor(2.0), (1e-4,), (seen,))


def monitor(
    last_state: Path | None = None, notes: Mapping[str, float] | None = None
) -> tuple[Monitor, Line, list]:
    line, logged = Line(), []
    made = Monitor(
        Plan(4, 1, 1, 8), Team(Accelerator(cpu=True)), line, log=lambda values, step: logged.append((step, values)),
        record=lambda *_: None, last_state=lambda: last_state, notes=notes or {},
        measures=lambda: {"adapter_norm": 3.0},
    )  # fmt: skip
    return made, line, logged


def test_losses_are_logged_and_shown() -> None:
    watching, line, logged = monitor()
    watching(outcome(0, 1.0, 1.0))
    watching(outcome(1, 0.5, 0.5))
    assert [(step, values["loss/current"], values["lr/group0"]) for step, values in logged] == [
        (1, 2, 1e-4),
        (2, 1, 1e-4),
    ]
    assert "epoch 1/2" in line.notes[0] and "lr 1.00e-04" in line.notes[0]


def test_smoothing_is_corrected_for_its_start() -> None:
    smoothed = Smoothed()
    assert smoothed.add(3.0) == pytest.approx(3.0)
    assert smoothed.add(1.0) == pytest.approx((0.98 * 3 + 1) / 1.98)


def test_smoothing_goes_on_after_a_resume() -> None:
    first, _, _ = monitor()
    first(outcome(0, 3.0))
    second, _, _ = monitor(notes=first.notes)
    second(outcome(1, 1.0))
    assert second.smoothed.value == pytest.approx((0.98 * 3 + 1) / 1.98)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_traced_to_its_item(bad: float) -> None:
    watching, _, _ = monitor(Path("out/a-state"))
    with pytest.raises(UserError, match=r"step 3, with item1 \(timestep 250\).*--resume out/a-state"):
        watching(outcome(2, 1.0, bad))


def test_a_gradient_that_is_no_number_ends_the_run_too() -> None:
    watching, _, _ = monitor()
    broken = replace(outcome(2, 1.0), norm=torch.tensor(float("nan")))
    with pytest.raises(UserError, match=r"gradient became nan at step 3, with item0 \(timestep 250\)"):
        watching(broken)


def test_with_a_scaled_loss_an_infinite_gradient_is_normal() -> None:
    watching, _, _ = monitor()
    watching.scale = lambda: 65536.0
    watching(replace(outcome(2, 1.0), norm=torch.tensor(float("inf"))))


def test_a_loss_scale_that_stays_low_ends_the_run() -> None:
    """Each step overflows and halves the scale: 2^16 at step 1, below 1 from step 18 on."""
    watching, _, _ = monitor(Path("out/a-state"))
    watching.log = None
    scales = iter([2.0**power for power in range(16, -20, -1)])
    watching.scale = lambda: next(scales)
    with pytest.raises(
        UserError, match="scale of float16 has fallen to 0.00098 by step 27.*out/a-state.*--dtype bfloat16"
    ):
        for step in range(40):
            watching(replace(outcome(step, 1.0), norm=torch.tensor(float("inf"))))


def test_a_loss_scale_that_recovers_is_well() -> None:
    watching, _, _ = monitor()
    watching.log = None
    scales = iter([0.5] * 9 + [2.0] + [0.5] * 9)
    watching.scale = lambda: next(scales)
    for step in range(19):
        watching(outcome(step, 1.0))


def test_all_that_is_promised_is_logged() -> None:
    watching, _, logged = monitor()
    for step in range(3):
        watching(outcome(step, 1.0, 1.0))
    watching.validated(3, 0.25)
    names = {"loss/current", "loss/average", "grad_norm", "lr/group0", "adapter_norm"}
    assert set(logged[0][1]) == names
    assert set(logged[1][1]) == names | {"images_per_second", "memory_gb"}
    assert logged[1][1]["adapter_norm"] == 3.0 and 0.01 < logged[1][1]["memory_gb"] < 100
    assert logged[-1] == (3, {"loss/validation": 0.25})


def test_the_line_is_renewed_a_few_times_a_second_and_counts_every_step() -> None:
    watching, line, _ = monitor()
    for step in range(8):
        watching(outcome(step, 1.0))
    watching.flush()
    assert sum(line.counts) == 8 and len(line.notes) < 8


class Pair(Team):
    """The first of two processes; the other one has seen what `other` holds."""

    def __init__(self, other: list[list[Seen]], loss: float) -> None:
        super().__init__(Accelerator(cpu=True))
        self.size, self.other, self.loss = 2, other, loss

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values + self.loss

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other]


def test_items_of_all_processes_are_recorded_and_named() -> None:
    watching, _, _ = monitor()
    recorded: list[Outcome] = []
    watching.record = lambda outcome, loss, norm: recorded.append(outcome)
    watching.team = Pair([[Seen(("far",), torch.tensor([0.75]), torch.tensor([0.5]), 0.5)]], 0.5)
    watching(outcome(0, 1.0, 2.0))
    items = [(item.key, item.t, item.loss) for seen in recorded[0].seen for item in seen.items()]
    assert items == [("item0", 0.25, 2.0), ("item1", 0.25, 4.0), ("far", 0.75, 1.0)]
    nan = float("nan")
    watching.team = Pair([[Seen(("far",), torch.tensor([0.75]), torch.tensor([nan]), 0.5)]], nan)
    with pytest.raises(UserError, match=r"with far \(timestep 750\)\."):
        watching(outcome(1, 1.0))
