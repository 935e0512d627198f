"""`kontext train` with networks of all kinds, and with weights to start from."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from kontext.checkpoints import open_source, transformer_config
from kontext.cli import main
from kontext.lora.files import read_adapter
from tests.training.dataset import Cached, cached_dataset

BASE = ["--seed", "42", "--network-dim", "4", "--learning-rate", "1e-3", "--max-data-loader-n-workers", "0"]


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory, tiny_files: Any) -> Cached:
    return cached_dataset(tmp_path_factory.mktemp("edits"), tiny_files)


def words(cached: Cached, output: Path, *more: str) -> list[str]:
    return ["train", *cached.models, *BASE, "--output-dir", str(output), "--output-name", "edit", *more]


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        ("DoRA", ["--network-args", "dora_wd=True"]),
        ("LoHa", ["--network-module", "networks.loha"]),
        ("LoKr", ["--network-module", "lokr", "--network-args", "factor=4"]),
    ],
)
def test_other_networks_train_and_go_on(
    cached: Cached, tiny_files: Any, tmp_path: Path, kind: str, asked: list[str]
) -> None:
    assert main(words(cached, tmp_path, "--max-train-steps", "3", *asked)) == 0
    file = tmp_path / "edit.safetensors"
    config = transformer_config(open_source(tiny_files.dit, "transformer"))
    before = read_adapter(file, config)
    assert before.kinds == [kind] and not before.unmatched
    assert metadata(file)["ss_network_module"] == {
        "DoRA": "networks.lora_flux", "LoHa": "networks.loha", "LoKr": "networks.lokr",
    }[kind]  # fmt: skip
    again = ["--network-weights", str(file), "--learning-rate", "1e-12", "--max-train-steps", "1"]
    assert main(words(cached, tmp_path / "next", *asked, *again)) == 0
    after = read_adapter(tmp_path / "next" / "edit.safetensors", config)
    for name, (delta,) in before.deltas.items():
        base = torch.randn(delta.change.shape, generator=torch.Generator().manual_seed(0))
        old, new = (adapter.deltas[name][0].change.dense(base) for adapter in (before, after))
        assert old.norm() > 0 and (new - old).norm() < 1e-4 * old.norm(), name
