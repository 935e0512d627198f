"""`kontext generate --dry-run`: what would be made, and what would fail."""

from pathlib import Path

import pytest
from PIL import Image

from kontext.cli import main
from tests.commands.test_train_dry import shown, size


@pytest.fixture
def line(generate, tmp_path: Path) -> list[str]:
    """The command line for two pictures from a reference of 100 x 70 pixels."""
    Image.new("RGB", (100, 70)).save(tmp_path / "photo.png")
    models = [str(part) for pair in generate.models.items() for part in pair]
    return [
        "generate", *models, "--device", "cpu", "--dtype", "float32", "--t5-max-length", "16", "--prompt", "red",
        "--control-image", str(tmp_path / "photo.png"), "--no-resize-control", "--images-per-prompt", "2", "--seed", "5",
        "--infer-steps", "1", "--save-path", str(tmp_path / "out"),
    ]  # fmt: skip


def test_sizes_are_those_of_the_pictures(
    line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*line, "--dry-run"]) == 0
    table = shown(capsys.readouterr().out)
    assert table["1"] == ["red", "96x64", "96x64", "1", "5"] and table["2"][-1] == "6"
    assert size(table["decoding the picture"][0]) > 2**20
    assert not list((tmp_path / "out").iterdir())
    assert main(line) == 0
    assert [Image.open(path).size for path in (tmp_path / "out").iterdir()] == [(96, 64)] * 2


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--tokenizer2", "nowhere", "--tokenizer2"), ("--vae", "--dit", "--vae expects"), ("--mask", "x", "x")],
)
def test_what_would_fail(
    line: list[str], capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    wrong = line[line.index(value) + 1] if value in line else value
    assert main([*line, option, wrong, "--dry-run"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--latent-path", "--save-merged-model"])
def test_what_makes_no_pictures_is_not_tried(
    line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert main([*line, option, str(tmp_path / "x.safetensors"), "--dry-run"]) == 2
    assert f"with {option} there is nothing to try" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "x.safetensors").exists()
