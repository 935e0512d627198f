"""`kontext train` with networks of all kinds, and with weights to start from."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

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


def test_sizes_come_from_the_weights(cached: Cached, tmp_path: Path) -> None:
    mixed = ["rank_patterns=double_blocks.*=6", "exclude_patterns=.*txt_mlp.*"]
    assert (
        main(
            words(
                cached, tmp_path, "--max-train-steps", "2", "--network-alpha", "2", "--network-args", *mixed
            )
        )
        == 0
    )
    file = tmp_path / "edit.safetensors"
    again = ["--network-weights", str(file), "--dim-from-weights", "--network-dim", "1"]
    assert (
        main(words(cached, tmp_path / "next", *again, "--learning-rate", "1e-12", "--max-train-steps", "1"))
        == 0
    )
    told = metadata(tmp_path / "next" / "edit.safetensors")
    assert (told["ss_network_dim"], told["ss_network_alpha"]) == ("Dynamic", "Dynamic"), (
        "not what was asked for"
    )
    old, new = load_file(file), load_file(tmp_path / "next" / "edit.safetensors")
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        torch.testing.assert_close(new[name], tensor)


@pytest.mark.parametrize(
    "rank",
    [
        pytest.param("1", id="w2 is a product"),
        pytest.param("64", id="w2 is whole"),
    ],
)
def test_factors_and_ranks_of_a_lokr_come_from_the_weights(cached: Cached, tmp_path: Path, rank: str) -> None:
    first = [
        "--network-module",
        "lokr",
        "--network-dim",
        rank,
        "--network-alpha",
        "0.5",
        "--max-train-steps",
        "2",
    ]
    assert main(words(cached, tmp_path, *first, "--network-args", "factor=4")) == 0
    file = tmp_path / "edit.safetensors"
    again = ["--network-module", "lokr", "--network-weights", str(file), "--dim-from-weights"]
    line = words(cached, tmp_path / "next", *again, "--learning-rate", "1e-12", "--max-train-steps", "1")
    assert main(line) == 0
    old, new = load_file(file), load_file(tmp_path / "next" / "edit.safetensors")
    assert old.keys() == new.keys()
    assert any(name.endswith("lokr_w2_a") for name in old) == (rank == "1")
    for name in {name.rpartition(".")[0] for name in old}:
        changes = []
        for tensors in (old, new):
            w2 = tensors.get(f"{name}.lokr_w2")
            low, strength = w2 is None, 1.0
            if low:
                w2 = tensors[f"{name}.lokr_w2_a"] @ tensors[f"{name}.lokr_w2_b"]
                strength = tensors[f"{name}.alpha"].item() / len(tensors[f"{name}.lokr_w2_b"])
            changes.append(strength * torch.kron(tensors[f"{name}.lokr_w1"], w2))
        torch.testing.assert_close(changes[1], changes[0], rtol=1e-4, atol=1e-7)
        assert changes[0].norm() > 0


def test_modules_beside_the_usual_ones_are_kept_with_their_sizes_or_told_of(
    cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = ["--max-train-steps", "1", "--network-args", "include_patterns=.*img_mod.*"]
    assert main(words(cached, tmp_path, *first)) == 0
    file = tmp_path / "edit.safetensors"
    again = ["--network-weights", str(file), "--max-train-steps", "1"]
    capsys.readouterr()
    assert main(words(cached, tmp_path / "all", *again, "--dim-from-weights")) == 0
    assert "left out" not in capsys.readouterr().err
    assert main(words(cached, tmp_path / "some", *again)) == 0
    assert "2 modules in it, such as double_blocks.0.img_mod.lin, are not trained" in capsys.readouterr().err
    less = ["--dim-from-weights", "--network-args", "exclude_patterns=single.*"]
    assert main(words(cached, tmp_path / "less", *again, *less)) == 0
    made = {n: load_file(tmp_path / n / "edit.safetensors").keys() for n in ("all", "some", "less")}
    assert made["all"] == load_file(file).keys()
    assert not any("img_mod" in name for name in made["some"])
    assert made["less"] == {name for name in made["all"] if "single" not in name}


def test_sizes_of_another_kind_of_network_are_refused(
    cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lokr = ["--network-module", "lokr", "--max-train-steps", "1"]
    assert main(words(cached, tmp_path, *lokr)) == 0
    weights = ["--network-weights", str(tmp_path / "edit.safetensors"), "--dim-from-weights"]
    assert main(words(cached, tmp_path / "next", *weights)) == 2
    assert "Set --network-module" in capsys.readouterr().err


def test_sizes_need_weights(cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(cached, tmp_path, "--dim-from-weights")) == 2
    assert "--dim-from-weights needs --network-weights" in capsys.readouterr().err


def test_base_weights_are_merged_before_training(cached: Cached, tiny_files: Any, tmp_path: Path) -> None:
    """The same as training on a checkpoint into which they were merged."""
    assert main(words(cached, tmp_path, "--max-train-steps", "3", "--learning-rate", "1e-1")) == 0
    base = str(tmp_path / "edit.safetensors")
    merged = tmp_path / "merged.safetensors"
    merge = [
        "--dit",
        str(tiny_files.dit),
        "--lora-weight",
        base,
        "--lora-multiplier",
        "0.5",
        "--output",
        str(merged),
    ]
    assert main(["merge", *merge, "--device", "cpu"]) == 0

    found = train(cached, tmp_path / "a", "--base-weights", base, "--base-weights-multiplier", "0.5")
    there = [str(merged) if word == str(tiny_files.dit) else word for word in cached.models]
    expected = train(dataclasses.replace(cached, models=there), tmp_path / "b")
    plain = train(cached, tmp_path / "c")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name])
    assert any((tensor - plain[name]).norm() > 0.01 * tensor.norm() for name, tensor in found.items())


def train(cached: Cached, folder: Path, *more: str) -> dict[str, Tensor]:
    assert main(words(cached, folder, "--max-train-steps", "2", *more)) == 0
    return load_file(folder / "edit.safetensors")
