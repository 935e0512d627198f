"""`kontext train --network-module none` as tests call it, on the cached dataset."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from kontext.cli import main
from tests.tiny import TinyFiles
from tests.training.dataset import Cached

BASE = "--seed 42 --learning-rate 1e-3 --max-data-loader-n-workers 0 --network-module none"


def on(cached: Cached, files: TinyFiles, dit: Path) -> Cached:
    """The same command line with another checkpoint."""
    return dataclasses.replace(cached, models=[str(dit) if w == str(files.dit) else w for w in cached.models])


def words(cached: Cached, output: Path, settings: str) -> list[str]:
    where = ["--output-dir", str(output), "--output-name", "edit"]
    return ["train", *cached.models, *where, *BASE.split(), *settings.split()]


def train(cached: Cached, output: Path, settings: str) -> int:
    return main(words(cached, output, settings))


def weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a file, or of all files of a folder."""
    if path.is_file():
        return load_file(path)
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def differ(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> set[str]:
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


def with_validation(cached: Cached, folder: Path) -> Cached:
    """The same dataset, whose items are held out too; its files go into `folder`."""
    config, held = folder / "d.toml", folder / "held"
    shutil.copytree(cached.config.parent / "cache", held)
    text = cached.config.read_text()
    block = text.partition("[[datasets]]")[2].replace(f"{cached.config.parent}/cache", str(held))
    config.write_text(f"{text}[[validation]]{block}")
    there = [str(config) if word == str(cached.config) else word for word in cached.models]
    return dataclasses.replace(cached, config=config, models=there)
