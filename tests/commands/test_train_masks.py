"""Loss masks from the dataset file to the loss of `kontext train`."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

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


def as_musubi_writes(folder: Path) -> None:
    """Rewrites the cache files in a folder: the same tensors, without our record; musubi-tuner knows no masks."""
    for path in folder.glob("*_fk*.safetensors"):
        with safe_open(path, "pt") as file:
            told = {name: value for name, value in file.metadata().items() if name != "kontext"}
        tensors = {name: tensor for name, tensor in load_file(path).items() if "mask" not in name}
        save_file(tensors, path, told)


@pytest.mark.parametrize("kind", ["mask_directory", "alpha_mask"])
def test_caches_of_musubi_lack_masks_and_are_encoded_anew(
    kind: str, cached: Cached, tmp_path: Path, tiny_files, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not silently trained without masks: one sentence names the command that adds them; the texts stay."""
    left = masked(cached, tmp_path, 24)
    plain = left.config.read_text().partition("mask_directory")[0]
    as_musubi_writes(tmp_path / "cache")
    texts = {path: path.read_bytes() for path in (tmp_path / "cache").glob("*_te.safetensors")}
    with_masks = left.config.read_text()
    left.config.write_text(plain)
    unmasked = first_loss(left, tmp_path / "plain")
    assert unmasked == first_loss(cached, tmp_path / "own")

    left.config.write_text(with_masks if kind == "mask_directory" else f"{plain}alpha_mask = true\n")
    capfd.readouterr()
    assert train(left, tmp_path / "early", "--max-train-steps 1") == 2
    told = " ".join(capfd.readouterr().err.split())
    assert "5 of 5 latents must be encoded (5 mask added): run `kontext cache-latents" in told
    words = ["--dataset-config", str(left.config), "--vae", str(tiny_files.vae), "--device", "cpu"]
    assert main(["cache-latents", *words]) == 0
    found = first_loss(left, tmp_path / "masked")
    if kind == "mask_directory":
        assert found != pytest.approx(unmasked, rel=1e-2)
    else:  # these pictures are opaque: everything counts
        assert found == pytest.approx(unmasked, rel=1e-5)
    assert {path: path.read_bytes() for path in texts} == texts
