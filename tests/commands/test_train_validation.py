import json
from pathlib import Path
from typing import Any

import pytest

from kontext.cli import main
from kontext.training.history import read_history
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
