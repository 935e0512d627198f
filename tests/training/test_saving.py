from pathlib import Path

import pytest
import torch

from kontext.files import atomic_write
from kontext.training.loop import Outcome
from kontext.training.names import STATE, Names
from kontext.training.plan import Plan
from kontext.training.saving import Keep, Saver, SaveRules

PLAN = Plan(batches=3, accumulation=1, processes=1, steps=12)


def outcome(step: int) -> Outcome:
    return Outcome(step, torch.zeros(()), torch.zeros(()), (0.1,), ())


def go(folder: Path, rules: SaveRules) -> Saver:
    names = Names(folder, "a")

    def write_state(path: Path, done: int) -> None:
        path.mkdir(exist_ok=True)
        (path / "state").write_text(str(done))

    saver = Saver(
        names, rules, PLAN, write_adapter=lambda path, done: path.touch(), write_state=write_state,
        later=lambda job: job(),
    )  # fmt: skip
    for step in range(PLAN.steps):
        saver(outcome(step))
    saver.finish()
    return saver


def names(folder: Path) -> list[str]:
    return sorted(path.name.removeprefix("a").removesuffix(".safetensors") for path in folder.iterdir())


def test_epochs_but_the_last(tmp_path: Path) -> None:
    go(tmp_path, SaveRules(every_epochs=1))
    assert names(tmp_path) == ["", "-000001", "-000002", "-000003"]


def test_steps(tmp_path: Path) -> None:
    go(tmp_path, SaveRules(every_steps=5))
    assert names(tmp_path) == ["", "-step00000005", "-step00000010"]


def test_the_last_epochs_are_kept(tmp_path: Path) -> None:
    go(tmp_path, SaveRules(every_epochs=1, adapters=Keep(epochs=2), with_state=True, states=Keep(epochs=1)))
    assert names(tmp_path) == ["", "-000002", "-000003", "-000003-state", "-state"]


def test_the_last_steps_are_kept(tmp_path: Path) -> None:
    go(tmp_path, SaveRules(every_steps=2, adapters=Keep(steps=4)))
    assert names(tmp_path) == ["", "-step00000008", "-step00000010", "-step00000012"]


def test_files_of_other_runs_stay(tmp_path: Path) -> None:
    for name in ("a2-000001.safetensors", "a-000001.txt", "a-step1.safetensors"):
        (tmp_path / name).touch()
    go(tmp_path, SaveRules(every_epochs=1, adapters=Keep(epochs=1)))
    assert {"2-000001", "-000001.txt", "-step1"} < set(names(tmp_path))
    assert "-000001" not in names(tmp_path)


def test_one_state_where_a_step_and_an_epoch_coincide(tmp_path: Path) -> None:
    go(tmp_path, SaveRules(every_epochs=2, every_steps=6, with_state=True))
    states = [name for name in names(tmp_path) if name.endswith(STATE)]
    assert states == ["-000002-state", "-state", "-step00000012-state"]


@pytest.mark.parametrize("rules", [SaveRules(), SaveRules(with_state=True), SaveRules(state_at_end=True)])
def test_an_interrupt_saves_a_state(tmp_path: Path, rules: SaveRules) -> None:
    written = []
    saver = Saver(
        Names(tmp_path, "a"), rules, PLAN, write_adapter=lambda path, done: None,
        write_state=lambda path, done: written.append((path.name, done)), later=lambda job: job(),
    )  # fmt: skip
    saver.interrupted(7)
    assert written == [("a-step00000007-state", 7)]


def test_what_a_killed_run_has_left_is_cleared_up(tmp_path: Path) -> None:
    """A file that it was writing, in a state too, and old files that it had not come to delete; nothing of others."""
    rules = SaveRules(every_steps=2, with_state=True, adapters=Keep(steps=2), states=Keep(steps=2))
    saver = go(tmp_path, rules)
    expected = names(tmp_path)
    for number in (4, 6):
        (tmp_path / f"a-step{number:08d}.safetensors").touch()
        (tmp_path / f"a-step{number:08d}-state").mkdir()
    (tmp_path / ".kontext-b.safetensors.1-0.tmp").touch()
    (tmp_path / ".kontext-a-2.safetensors.1-0.tmp").touch()
    for target in ("a-step00000012.safetensors", "a-best.safetensors", "a-state/state.safetensors", "a.html"):
        with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / target) as temporary:
            temporary.touch()
            kept = temporary.rename(temporary.with_suffix(".kept"))
            raise KeyboardInterrupt
        kept.rename(kept.with_suffix(".tmp"))
    (tmp_path / ".kontext-a.1-0.tmp").mkdir()
    (tmp_path / "sample").mkdir()
    for name in ("a_000004_00_20261123154359_42_000.png", "a_e000004_grid.png", "a_b_000004_grid.png"):
        (tmp_path / "sample" / f".kontext-{name}.1-0.tmp").touch()
    saver.tidy(12)
    assert names(tmp_path) == sorted(
        [*expected, ".kontext-a-2.safetensors.1-0.tmp", ".kontext-b.safetensors.1-0.tmp", "sample"]
    )
    assert [path.name for path in (tmp_path / "sample").iterdir()] == [".kontext-a_b_000004_grid.png.1-0.tmp"]
    assert [path.name for path in (tmp_path / "a-state").iterdir()] == ["state"]
