"""Training shared by two processes."""

import json
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from tests.launch import accelerate_launch, encoded, launch, loaded
from tests.training.command import files, train, words
from tests.training.dataset import Cached

EPOCHS = 2
BATCHES = 3  # an epoch, of at most two of the five items: the first process takes two of them
PROMPTS = ["make it red", "remove it", "make it blue"]
SETTINGS = f"--max-train-epochs {EPOCHS} --network-dropout 0.1"


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
    for code, shown in [end for run in runs for end in run.ended()]:
        assert code == 0, shown

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


def test_when_one_is_killed_the_other_ends_with_an_error(cached: Cached, tmp_path: Path) -> None:
    run = launch(tmp_path, *words(cached, tmp_path / "out", "--max-train-steps 100000"))
    history, deadline = tmp_path / "out" / "edit.history.jsonl", time.monotonic() + 90
    while not (history.exists() and history.read_text().count("loss")):
        assert time.monotonic() < deadline and run.processes[0].poll() is None
        time.sleep(0.1)
    run.processes[1].kill()
    (code, shown), (other_code, _) = run.ended(60)
    assert other_code == -9 and code == 2 and "Another process of this run has ended" in shown
    assert "stopped" in (tmp_path / "out" / "edit.html").read_text()
