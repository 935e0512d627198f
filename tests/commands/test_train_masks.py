"""Loss masks from the dataset file to the loss of `kontext train`."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from kontext.cli import main
from tests.training.command import train
from tests.training.dataset import Cached


def masked(cached: Cached, root: Path, white: int) -> Cached:
    """The dataset with masks whose first `white` columns count; its text embeddings are taken over."""
    text = cached.config.read_text()
    folder = cached.config.parent
    for path in sorted((folder / "after").glob("*.png")):
        mask = Image.new("L", Image.open(path).size)
        mask.paste(255, (0, 0, white, mask.height))
        (root / "masks").mkdir(parents=True, exist_ok=True)
        mask.save(root / "masks" / path.name)
    shutil.copytree(folder / "cache", root / "cache")
    config = root / "dataset.toml"
    config.write_text(
        text.replace(str(folder / "cache"), str(root / "cache")) + f"mask_directory = '{root / 'masks'}'\n"
    )
    models = [str(config) if word == str(cached.config) else word for word in cached.models]
    return replace(cached, config=config, models=models)


def first_loss(cached: Cached, output: Path) -> float:
    assert train(cached, output, "--max-train-steps 1") == 0
    lines = (output / "edit.history.jsonl").read_text().splitlines()
    return next(line["loss"] for line in map(json.loads, lines) if "loss" in line)


def test_masks_reach_the_loss(
    cached: Cached, tmp_path: Path, tiny_files, capfd: pytest.CaptureFixture[str]
) -> None:
    everything, left = masked(cached, tmp_path / "all", 1000), masked(cached, tmp_path / "left", 24)
    assert train(left, tmp_path / "early", "--max-train-steps 1") == 2
    assert "(5 mask added)" in capfd.readouterr().err
    for dataset in (everything, left):
        words = ["--dataset-config", str(dataset.config), "--vae", str(tiny_files.vae), "--device", "cpu"]
        assert main(["cache-latents", *words]) == 0
    plain = first_loss(cached, tmp_path / "plain")
    assert first_loss(everything, tmp_path / "white") == pytest.approx(plain, rel=1e-5)
    assert first_loss(left, tmp_path / "half") != pytest.approx(plain, rel=1e-2)
