import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from kontext.cli import main
from tests.training.dataset import Cached, cached_dataset

BASE = ["--seed", "42", "--network-dim", "4", "--learning-rate", "1e-3", "--max-data-loader-n-workers", "0"]


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory, tiny_files: Any) -> Cached:
    return cached_dataset(tmp_path_factory.mktemp("edits"), tiny_files)


def words(cached: Cached, output: Path, *more: str) -> list[str]:
    return ["train", *cached.models, *BASE, "--output-dir", str(output), "--output-name", "edit", *more]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_a_run_from_start_to_file(cached: Cached, tmp_path: Path) -> None:
    assert main(words(cached, tmp_path, "--max-train-epochs", "2", "--save-every-n-epochs", "1")) == 0
    assert files(tmp_path) == ["edit-000001.safetensors", "edit.safetensors"]
    assert metadata(tmp_path / "edit.safetensors")["ss_steps"] == "6"
    assert any(tensor.abs().max() > 0 for name, tensor in load_file(tmp_path / "edit.safetensors").items() if "up" in name)
