import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from kontext.cli import main
from kontext.generation.pipeline import Kontext
from kontext.training.history import read_history
from kontext.training.objective import Objective
from tests.commands.test_train import words
from tests.training.dataset import Cached, cached_dataset


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory, tiny_files: Any) -> Cached:
    return cached_dataset(tmp_path_factory.mktemp("edits"), tiny_files)


@pytest.fixture(scope="module")
def held_out(cached: Cached) -> Cached:
    """The same, with a block to validate with: its own pictures, as one held out for good."""
    root = cached.config.parent
    block = f"[[validation]]\nimage_directory = '{root}/before'\ncontrol_directory = '{root}/after'\n"
    for caption in (root / "after").glob("*.txt"):
        (root / "before" / caption.name).write_text("undo")
    config = root / "validated.toml"
    config.write_text(cached.config.read_text() + block + f"cache_directory = '{root}/held'\n")
    models = [str(config) if word == str(cached.config) else word for word in cached.models]
    encoders = models[models.index("--text-encoder1") :]
    common = models[: models.index("--dit")]
    vae = models[models.index("--vae") :][:2]
    assert main(["cache-latents", *common, *vae, "--num-workers", "0"]) == 0
    assert main(["cache-text", *common, *encoders]) == 0
    return Cached(config, cached.reference, models)


def test_validation_changes_no_byte_and_keeps_the_best(
    cached: Cached, held_out: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [
        "--max-train-steps",
        "6",
        "--network-dropout",
        "0.1",
        "--save-every-n-steps",
        "2",
        "--save-state",
    ]
    validated = [*steps, "--validate-every-n-steps", "2", "--learning-rate", "3e-2"]
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    assert main(words(cached, plain, *steps, "--learning-rate", "3e-2")) == 0
    capsys.readouterr()
    assert main(words(held_out, watched, *validated)) == 0
    assert "Validation loss after step 2: " in capsys.readouterr().err
    assert (watched / "edit.safetensors").read_bytes() == (plain / "edit.safetensors").read_bytes()

    points = read_history(watched / "edit.history.jsonl").validation
    assert [point.step for point in points] == [2, 4, 6]
    best = min(points, key=lambda point: point.loss)
    kept = (watched / "edit-best.safetensors").read_bytes()
    assert kept == (watched / f"edit-step{best.step:08d}.safetensors").read_bytes()

    resumed = ["--resume", str(watched / "edit-step00000002-state")]
    again = tmp_path / "again"
    assert main(words(held_out, again, *validated, *resumed)) == 0
    if best.step > 2:
        assert (again / "edit-best.safetensors").read_bytes() == kept
    else:
        assert not (again / "edit-best.safetensors").exists()
    for folder in ("edit-state", "edit-step00000004-state"):
        assert _bytes(again / folder) == _bytes(watched / folder)


def _bytes(folder: Path) -> bytes:
    return (folder / "state.safetensors").read_bytes()


@pytest.mark.parametrize("what", ["validation", "samples"])
def test_a_signal_breaks_off_what_takes_long_and_a_run_that_goes_on_makes_up_for_it(
    what: str,
    held_out: Cached,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The grace that a machine gives before it is taken away is shorter than either; no state was asked for."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("make it red --w 64 --h 64 --s 3")
    every = ["--validate-every-n-steps", "2", "--sample-every-n-steps", "2", "--sample-prompts", str(prompts)]
    settings, broken, whole = ["--max-train-steps", "5", *every], tmp_path / "broken", tmp_path / "whole"
    place, name = {"validation": (Objective, "losses"), "samples": (Kontext, "denoise")}[what]
    function, calls = getattr(place, name), []

    def signalling(*given: Any, **named: Any) -> Any:
        calls.append(None)
        if len(calls) == (18 if what == "validation" else 2):  # 2 steps, 3 batches at 4 levels, 2 steps
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, signalling)
        assert main(words(held_out, broken, *settings)) == 130
    shown = capsys.readouterr().err
    assert f"The {what} after step 4 {'is' if what == 'validation' else 'are'} broken off" in shown
    assert len(list(broken.glob("edit-step00000004-state"))) == 1
    assert main(words(held_out, broken, *settings, "--resume", "auto")) == 0
    assert main(words(held_out, whole, *settings)) == 0
    for file in ("edit.safetensors", "edit-best.safetensors"):
        assert (broken / file).read_bytes() == (whole / file).read_bytes()
    histories = [read_history(folder / "edit.history.jsonl") for folder in (broken, whole)]
    assert histories[0].validation == histories[1].validation
    assert (
        [each.step for each in histories[0].samples] == [each.step for each in histories[1].samples] == [2, 4]
    )
    grids = [
        [path.read_bytes() for path in sorted(each.glob("sample/*grid.png"))] for each in (broken, whole)
    ]
    assert grids[0] == grids[1] and len(grids[0]) == 2


def test_the_logs_have_it(held_out: Cached, tmp_path: Path) -> None:
    assert main(words(held_out, tmp_path, "--max-train-epochs", "1")) == 0
    lines = (tmp_path / "edit.history.jsonl").read_text().splitlines()
    (line,) = (json.loads(line) for line in lines if "validation" in line)
    assert line["step"] == 3 and line["validation"] > 0


def test_nothing_to_validate_with_is_told(
    cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(cached, tmp_path, "--validate-every-n-epochs", "1")) == 2
    assert "--validate-every-n-epochs needs a [[validation]] block" in capsys.readouterr().err
