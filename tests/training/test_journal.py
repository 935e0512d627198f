from pathlib import Path

import pytest
import torch

from kontext.errors import UserError
from kontext.training.history import read_history
from kontext.training.journal import Journal
from kontext.training.loop import Outcome, Seen
from kontext.training.plan import Plan
from kontext.training.report import About
from tests.training.page import Page


def journal(folder: Path, *, wanted: bool = True) -> Journal:
    about = About("edit", Plan(10, 1, 1, 20), (), {}, folder)
    return Journal(folder / "edit.history.jsonl", folder / "edit.html", about, done=0, wanted=wanted)


def outcome(step: int) -> Outcome:
    seen = Seen(("a",), torch.tensor([0.5]), torch.tensor([0.25]), 1.0)
    return Outcome(step, torch.tensor(0.25), torch.tensor(1.0), (1e-4,), (seen,))


def seen(folder: Path) -> Page:
    return Page((folder / "edit.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "error, words",
    [
        (KeyboardInterrupt(), "Interrupted"),
        (UserError("The loss became nan <here>"), "The loss became nan <here>"),
        (RuntimeError("CUDA out of memory"), "RuntimeError: CUDA out of memory"),
    ],
)
def test_the_report_says_how_a_run_ended(error: BaseException, words: str, tmp_path: Path) -> None:
    with pytest.raises(type(error)), journal(tmp_path) as kept:
        kept.step(outcome(0), 0.25, 1.0)
        raise error
    assert words in seen(tmp_path).text
    assert read_history(tmp_path / "edit.history.jsonl").loss.tolist() == [0.25]


def test_a_page_is_written_when_something_is_saved_or_drawn(tmp_path: Path) -> None:
    with journal(tmp_path) as kept:
        listen = kept.listener(lambda step: step == 1)
        written = []
        for step in range(4):
            kept.step(outcome(step), 0.25, 1.0)
            if step == 3:
                kept.samples(4, "000004", [tmp_path / "sample" / "a.png"])
            listen(outcome(step))
            if (tmp_path / "edit.html").exists():
                written.append(seen(tmp_path).series("Loss", "loss")[0][-1])
                assert "Running" in seen(tmp_path).text
    assert written == [2, 2, 4]
    assert "Finished" in seen(tmp_path).text
    assert read_history(tmp_path / "edit.history.jsonl").samples[0].pictures == ("a.png",)


def test_an_unwanted_journal_writes_nothing(tmp_path: Path) -> None:
    with journal(tmp_path, wanted=False) as kept:
        kept.step(outcome(0), 0.25, 1.0)
        kept.samples(1, "000001", [])
        kept.flush()
        kept.listener(lambda step: True)(outcome(0))
    assert list(tmp_path.iterdir()) == []
