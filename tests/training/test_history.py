import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kontext.training import history as module
from kontext.training.ahead import Pass
from kontext.training.history import Recorder, SampleSet, Validation, read_history
from kontext.training.loop import Outcome, Seen
from tests.training.world import Run


def outcome(step: int, *, rates: tuple[float, ...] = (1e-4,)) -> Outcome:
    """Two batches of a step: two items and one; the numbers follow from the step."""
    first = Seen(("a", "b"), torch.tensor([0.25, 0.5]), torch.tensor([0.1, 0.2]) * (step + 1), 2 / 3)
    second = Seen(("c",), torch.tensor([0.75]), torch.tensor([0.3]) * (step + 1), 1 / 3)
    return Outcome(step, torch.tensor(0.6), torch.tensor(1.0), rates, (first, second))


def record(path: Path, steps: range, *, done: int = 0) -> Recorder:
    recorder = Recorder(path, done=done)
    for step in steps:
        recorder.step(outcome(step), loss=0.5 / (step + 1), norm=2.0 + step)
    return recorder


def test_what_is_recorded_is_read_back(tmp_path: Path) -> None:
    recorder = record(tmp_path / "h.jsonl", range(3))
    recorder.validation(3, 0.4)
    recorder.samples(3, "e000001", ["a.png", "b.png"])
    recorder.flush()
    read = read_history(tmp_path / "h.jsonl")
    assert read.step.tolist() == [1, 2, 3]
    assert read.loss == pytest.approx([0.5, 0.25, 0.5 / 3])
    assert read.norm.tolist() == [2.0, 3.0, 4.0]
    assert read.rates.tolist() == [[1e-4]] * 3
    assert read.levels.tolist() == [0.25, 0.5, 0.75] * 3
    assert read.item_losses == pytest.approx([0.3, 0.6, 0.9, 0.6, 1.2, 1.8, 0.9, 1.8, 2.7])
    assert read.validation == (Validation(3, 0.4),)
    assert read.samples == (SampleSet(3, "e000001", ("a.png", "b.png")),)
    for name in ("step", "loss", "norm", "time", "rates", "levels", "item_losses"):
        assert np.array_equal(getattr(read, name), getattr(recorder.history, name)), name
    assert read.sittings == recorder.history.sittings


def test_every_line_is_json_by_itself(tmp_path: Path) -> None:
    record(tmp_path / "h.jsonl", range(2)).flush()
    begun, first, second = map(json.loads, (tmp_path / "h.jsonl").read_text().splitlines())
    assert begun["step"] == 0 and begun["begun"] == pytest.approx(first["time"], abs=60)
    assert second | {"time": 0} == {
        "step": 2, "loss": 0.25, "norm": 3.0, "rates": [0.0001], "time": 0,
        "items": [[0.25, pytest.approx(0.6)], [0.5, pytest.approx(1.2)], [0.75, pytest.approx(1.8)]],
    }  # fmt: skip


@pytest.mark.parametrize("accumulation", [1, 2])
def test_items_have_their_own_losses(accumulation: int, tmp_path: Path) -> None:
    """The pairs are the noise levels and losses that the objective gives for each item at the weights of that step."""
    run = Run(steps=2, accumulation=accumulation, items=6)
    expected_levels, expected = [], []
    with torch.no_grad():
        for index in run.plan.group(0):
            example = run.examples.example(0, index)
            levels = run.objective.levels(example)
            expected_levels += levels.tolist()
            expected += run.objective.losses(Pass(example, levels)).tolist()
    recorder = Recorder(tmp_path / "h.jsonl", done=0)
    run.go(listeners=[lambda outcome: recorder.step(outcome, outcome.loss.item(), outcome.norm.item())])
    found = recorder.history
    assert found.levels[: len(expected)] == pytest.approx(expected_levels)
    assert found.item_losses[: len(expected)] == pytest.approx(expected, rel=1e-5)
    assert found.loss == pytest.approx(run.losses)
    assert found.loss[0] == pytest.approx(np.mean(expected), rel=1e-5)


def test_recording_changes_no_weight(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "h.jsonl", done=0)
    recorded = Run(steps=3).go(listeners=[lambda outcome: recorder.step(outcome, outcome.loss.item(), 0.0)])
    assert recorded.same_weights(Run(steps=3).go())


def test_a_run_that_goes_on_drops_what_it_does_again(tmp_path: Path) -> None:
    recorder = record(tmp_path / "h.jsonl", range(5))
    recorder.samples(2, "000002", ["early.png"])
    recorder.samples(4, "000004", ["late.png"])
    recorder.flush()
    record(tmp_path / "h.jsonl", range(3, 4), done=3).flush()
    read = read_history(tmp_path / "h.jsonl")
    assert read.step.tolist() == [1, 2, 3, 4]
    assert [one.label for one in read.samples] == ["000002"]
    assert len(read.levels) == 12
    assert [sitting.row for sitting in read.sittings] == [0, 3]


def test_a_new_run_begins_a_new_history(tmp_path: Path) -> None:
    record(tmp_path / "h.jsonl", range(5)).flush()
    record(tmp_path / "h.jsonl", range(1)).flush()
    assert read_history(tmp_path / "h.jsonl").step.tolist() == [1]


@pytest.mark.parametrize(
    "torn", ['{"step":4,"loss":0.1', '{"step":4,"loss":0.1,"norm":1}', "\x00\x00", "7", "{}"]
)
def test_a_torn_line_is_ignored(torn: str, tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    record(path, range(3)).flush()
    whole = path.read_text()
    path.write_text(whole + torn)
    assert read_history(path).step.tolist() == [1, 2, 3]
    record(path, range(3, 4), done=3).flush()
    assert read_history(path).step.tolist() == [1, 2, 3, 4]
    assert path.read_text().startswith(whole)


def test_what_is_not_finite_is_kept_as_missing(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "h.jsonl", done=0)
    recorder.step(outcome(0), loss=0.5, norm=float("inf"))
    recorder.flush()
    assert "Infinity" not in (tmp_path / "h.jsonl").read_text()
    assert np.isnan(read_history(tmp_path / "h.jsonl").norm).all()


def test_time_leaves_pauses_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 101.0, 102.0, 500.0, 503.0])
    monkeypatch.setattr(module.time, "time", lambda: next(clock))
    record(tmp_path / "h.jsonl", range(2)).flush()
    recorder = record(tmp_path / "h.jsonl", range(2, 3), done=2)
    assert recorder.history.seconds == 2 + 3


def test_lines_wait_for_the_disk_but_not_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    recorder = record(tmp_path / "h.jsonl", range(3))
    assert (tmp_path / "h.jsonl").read_text() == ""
    now = module.SECONDS_BETWEEN_WRITES + 1
    recorder.step(outcome(3), loss=0.1, norm=1.0)
    assert read_history(tmp_path / "h.jsonl").step.tolist() == [1, 2, 3, 4]


def test_no_file_is_an_empty_history(tmp_path: Path) -> None:
    read = read_history(tmp_path / "none.jsonl")
    assert len(read.step) == 0 and read.rates.shape == (0, 0) and read.seconds == 0
