"""Training shared by two processes."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from kontext.cli import main
from kontext.commands import train_values
from kontext.training.objective import Objective
from kontext.training.team import Team
from tests.launch import Launch, accelerate_launch, encoded, launch, loaded
from tests.training.command import files, train, words
from tests.training.dataset import Cached

EPOCHS = 2
BATCHES = 3  # an epoch, of at most two of the five items: the first process takes two of them
PROMPTS = ["make it red", "remove it", "make it blue"]
SETTINGS = f"--max-train-epochs {EPOCHS} --network-dropout 0.1 --network-args module_dropout=0.4"


def prompts(folder: Path, cached: Cached) -> str:
    path = folder / "prompts.txt"
    lines = [PROMPTS[0], f"{PROMPTS[1]} --ci {cached.reference}", PROMPTS[2]]
    path.write_text("\n".join(f"{line} --w 64 --h 64 --s 1 --d {seed}" for seed, line in enumerate(lines)))
    return f"--sample-prompts {path} --sample-at-first --sample-every-n-epochs 1"


def step_lines(folder: Path) -> list[dict]:
    lines = (folder / "edit.history.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def test_two_train_as_one_and_share_items_and_samples(cached: Cached, tmp_path: Path) -> None:
    """The same batches in a step, shared by two processes or taken one after the other."""
    plain, sampled, alone = (tmp_path / name for name in ("plain", "sampled", "alone"))
    sampling = prompts(tmp_path, cached)
    runs = [
        accelerate_launch(tmp_path / "a", *words(cached, plain, f"{SETTINGS} --no-report")),
        launch(tmp_path / "b", *words(cached, sampled, f"{SETTINGS} {sampling}")),
    ]
    assert train(cached, alone, f"{SETTINGS} {sampling} --gradient-accumulation-steps 2") == 0
    ends = [end for run in runs for end in run.ended()]
    for code, shown in ends:
        assert code == 0, shown
    assert ends[1][1].count("resized to Kontext's nearest size") == 1, (
        "of a reference that the second encodes"
    )

    one, two = (load_file(folder / "edit.safetensors") for folder in (alone, plain))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-8)
    assert (plain / "edit.safetensors").read_bytes() == (sampled / "edit.safetensors").read_bytes()
    first, second = loaded(tmp_path / "a")
    assert len(first) + len(second) == 5 * EPOCHS and second, "both have worked"
    for epoch in range(EPOCHS):
        seen = first[len(first) // EPOCHS * epoch :][: len(first) // EPOCHS]
        seen += second[len(second) // EPOCHS * epoch :][: len(second) // EPOCHS]
        assert sorted(seen) == list("01234"), "each item once in an epoch"

    mine, theirs = step_lines(alone), step_lines(sampled)
    assert [len(line["items"]) for line in theirs] == [len(line["items"]) for line in mine]
    for ours, other in zip(mine, theirs, strict=True):
        assert sorted(level for level, _ in ours["items"]) == sorted(level for level, _ in other["items"])
        assert abs(ours["loss"] - other["loss"]) < 1e-5
    assert (sampled / "edit.html").read_text().count('figure class="sample"') == (1 + EPOCHS) * 3
    assert files(sampled) == files(alone)
    assert encoded(tmp_path / "b") == [PROMPTS[0::2], PROMPTS[1::2]], "each encodes what it draws"
    pictures = [sorted((folder / "sample").iterdir()) for folder in (alone, sampled)]
    assert len(pictures[0]) == len(pictures[1]) == (1 + EPOCHS) * (3 + 1)
    for one, two in zip(*pictures, strict=True):  # names begin with run, epoch and number
        assert one.name[:16] == two.name[:16]
        if "_000000_" in one.name:  # before training the weights are the very same
            assert Image.open(one).tobytes() == Image.open(two).tobytes()


class Second(Team):
    """The second process of two, as far as it is told what the first has: `first` of what it has itself."""

    def __init__(self, first: Callable[[Any], Any]) -> None:
        super().__init__(Accelerator(cpu=True))
        self.first = first

    def gather(self, value: Any) -> list[Any]:
        return [self.first(value), value]


def test_a_seed_that_is_drawn_is_the_same_in_all(
    cached: Cached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each would begin with other weights and see other items."""
    given = words(cached, tmp_path / "given", "--max-train-steps 1 --no-metadata")
    assert given[(place := given.index("--seed")) + 1] == "42" and main(given) == 0
    drawn = words(cached, tmp_path / "drawn", "--max-train-steps 1 --no-metadata")
    del drawn[place : place + 2]
    monkeypatch.setattr(
        train_values, "team", lambda _: Second(lambda own: 42 if isinstance(own, int) else own)
    )
    assert main(drawn) == 0
    contents = [(tmp_path / name / "edit.safetensors").read_bytes() for name in ("given", "drawn")]
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"steps done": 6}, "steps done is 0 there, 6 in the first"),
        ({"dataset": "ab12"}, "in the first. Give the same command on all machines, with dataset"),
    ],
)
def test_processes_that_would_not_train_alike_do_not_begin(
    other: dict[str, Any],
    told: str,
    cached: Cached,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Such as one on a machine that does not see the states of the first: they would wait for each other in vain."""
    mixed = Second(lambda own: own | other if isinstance(own, dict) else own)
    monkeypatch.setattr(train_values, "team", lambda _: mixed)
    assert train(cached, tmp_path, "--max-train-steps 1") == 2
    assert told in " ".join(capfd.readouterr().err.split())


def test_all_wait_for_the_one_that_saves_on_the_way_out(
    cached: Cached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher that sees one of them end ends the others."""
    saved: list[bool] = []

    class Met(Team):
        def gather(self, value: Any) -> list[Any]:
            saved.append(any(tmp_path.glob("edit-step*-state/state.safetensors")))
            return [value]

    losses = Objective.losses

    def signalled(*given: Any) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return losses(*given)

    monkeypatch.setattr(Objective, "losses", signalled)
    monkeypatch.setattr(train_values, "team", lambda _: Met(Accelerator(cpu=True)))
    assert train(cached, tmp_path, "--max-train-steps 1000") == 130
    assert saved[-1]


def test_one_that_does_not_write_knows_the_state_to_go_back_to(
    cached: Cached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A launcher may show its message alone."""
    other = Team(Accelerator(cpu=True))
    other.leads = False
    monkeypatch.setattr(train_values, "team", lambda _: other)
    settings = (
        "--max-train-steps 9 --save-every-n-steps 1 --save-state --learning-rate 1e30 --max-grad-norm 0"
    )
    assert train(cached, tmp_path, settings) == 2
    told = " ".join(capfd.readouterr().err.split())
    assert "The loss became nan at step 2" in told
    assert f"Go back with --resume {tmp_path}/edit-step00000001-state" in told
    assert not any(tmp_path.iterdir())


def at_work(cached: Cached, folder: Path, settings: str) -> Launch:
    """Two processes that are in the middle of a long run, which writes to `folder`/out."""
    run = launch(folder, *words(cached, folder / "out", f"--max-train-steps 100000 {settings}"))
    history, deadline = folder / "out" / "edit.history.jsonl", time.monotonic() + 90
    while not (history.exists() and history.read_text().count("loss")):
        assert time.monotonic() < deadline and run.processes[0].poll() is None
        time.sleep(0.1)
    return run


def test_when_one_is_killed_the_other_ends_with_an_error(cached: Cached, tmp_path: Path) -> None:
    run = at_work(cached, tmp_path, "")
    run.processes[1].kill()
    (code, shown), (other_code, _) = run.ended(60)
    assert other_code == -9 and code == 2 and "Another process of this run has ended" in shown
    assert "stopped" in (tmp_path / "out" / "edit.html").read_text()


def test_one_that_does_not_come_is_waited_for_as_long_as_was_said(cached: Cached, tmp_path: Path) -> None:
    run = at_work(cached, tmp_path, "--ddp-timeout 0.1")
    run.processes[1].send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    try:
        shown = run.processes[0].communicate(timeout=60)[0]
    finally:
        run.processes[1].kill()
        run.processes[1].communicate()
    assert run.processes[0].returncode == 2 and "does not answer (--ddp-timeout)" in shown
    assert 5 < time.monotonic() - begun < 30
