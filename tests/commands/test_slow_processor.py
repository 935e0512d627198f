"""The commands with --dtype bfloat16 on a processor without instructions for it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kontext import device
from kontext.cli import main
from kontext.data.cache import read_text
from tests.data.folders import pairs
from tests.tiny import TEXT_LENGTH, TinyFiles
from tests.training import whole
from tests.training.command import metadata, words
from tests.training.dataset import Cached

NOTICE = "--dtype bfloat16: this processor has no instructions for it, and computes in float32"


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "is_fast", lambda dtype: dtype == torch.float32)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def cache_text(folder: Path, files: TinyFiles, dtype: str) -> tuple[Tensor, Tensor]:
    config = pairs(folder, "a")
    given = ["--dataset-config", config, "--text-encoder1", files.t5, "--text-encoder2", files.clip]
    given += ["--device", "cpu", "--dtype", dtype, "--t5-max-length", TEXT_LENGTH]
    assert main(["cache-text", *map(str, given)]) == 0
    text = read_text(folder / "cache" / "a_fk_te.safetensors")
    return text.txt, text.vector


def test_embeddings_are_written_in_what_was_asked_for(
    tmp_path: Path, tiny_files: TinyFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    found = cache_text(tmp_path / "bfloat16", tiny_files, "bfloat16")
    assert NOTICE in said(capsys)
    expected = cache_text(tmp_path / "float32", tiny_files, "float32")
    assert "instructions" not in said(capsys)
    for mine, exact in zip(found, expected, strict=True):
        assert mine.dtype == torch.bfloat16 and exact.dtype == torch.float32
        assert apart(mine, exact) < 0.01


def test_latents_are_rounded_only_when_they_are_written(tmp_path: Path, cached: Cached) -> None:
    config = tmp_path / "d.toml"
    config.write_text(cached.config.read_text().replace(f"{cached.config.parent}/cache", str(tmp_path)))
    vae = cached.models[cached.models.index("--vae") + 1]
    given = ["--dataset-config", str(config), "--vae", vae, "--device", "cpu", "--num-workers", "0"]
    assert main(["cache-latents", *given, "--vae-dtype", "bfloat16"]) == 0
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) == 5
    for file in files:
        exact = load_file(cached.config.parent / "cache" / file.name)
        for name, tensor in load_file(file).items():
            assert torch.equal(tensor, exact[name.replace("bfloat16", "float32")].bfloat16())


def test_pictures(generate: Any, tmp_path: Path) -> None:
    """A LoRA-free picture differs from float32's by the rounding of weights alone, and says what was asked for."""
    latents = []
    for dtype in ("bfloat16", "float32"):
        more = ("--prompt", "red", "--seed", 1, "--output-type", "latent", "--dtype", dtype)
        code, told = generate(*more, out=tmp_path / dtype)
        assert code == 0 and (NOTICE in told) == (dtype == "bfloat16"), told
        (file,) = (tmp_path / dtype).glob("*.safetensors")
        latents.append(load_file(file)["latent"])
    assert 1e-5 < apart(*latents) < 0.02


@pytest.mark.parametrize("more", [[], ["--dry-run"], ["--dry-run", "--vram-budget", "8"]], ids=str)
def test_what_is_not_as_asked_is_said_once(generate: Any, tmp_path: Path, more: list[str]) -> None:
    """By a dry run as by a real one."""
    given = ("--prompt", "red", "--dtype", "bfloat16", "--vae-dtype", "float16", "--int8-fast")
    code, told = generate(*given, *more, out=tmp_path)
    assert code == 0, told
    for start in (
        NOTICE,
        NOTICE.replace("--dtype bfloat16", "--vae-dtype float16"),
        "--int8-fast: cpu has no",
    ):
        assert told.count(start) == 1, told


def test_nor_does_training_repeat_itself(
    cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = "--dtype bfloat16 --int8-fast --gradient-checkpointing --gradient-checkpointing-cpu-offload"
    for more in ("--vram-budget 8 --dry-run", "--vram-budget 8 --max-train-steps 1"):
        assert main(words(cached, tmp_path, f"{settings} {more}")) == 0
        told = said(capsys)
        for start in (NOTICE, "--int8-fast: cpu has no", "--gradient-checkpointing-cpu-offload: on a CPU"):
            assert told.count(start) == 1, told


def trained(cached: Cached, folder: Path, dtype: str, settings: str = "") -> dict[str, Tensor]:
    line = words(cached, folder, f"--max-train-steps 3 --dtype {dtype} {settings}")
    assert main(line) == 0
    return load_file(folder / "edit.safetensors")


def test_a_lora_trains_as_in_float32(
    cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = trained(cached, tmp_path / "a", "bfloat16", "--checkpointing selective --blocks-to-swap 1")
    assert NOTICE in said(capsys)
    assert metadata(tmp_path / "a" / "edit.safetensors")["ss_mixed_precision"] == "bf16"
    expected = trained(cached, tmp_path / "b", "float32")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert sum(apart(found[name], tensor) < 0.2 for name, tensor in expected.items()) > 0.9 * len(expected)


def test_a_resumed_run_writes_the_same_bytes(cached: Cached, tmp_path: Path) -> None:
    settings = "--save-every-n-steps 2 --save-state"
    trained(cached, tmp_path / "a", "bfloat16", settings)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "edit.safetensors").unlink()
    trained(cached, tmp_path / "b", "bfloat16", f"{settings} --resume auto")
    first, second = ((tmp_path / name / "edit.safetensors").read_bytes() for name in "ab")
    assert first == second


def test_a_dry_run_counts_two_bytes_for_a_weight(
    cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = []
    for dtype in ("bfloat16", "float32"):
        assert main(words(cached, tmp_path, f"--dry-run --dtype {dtype}")) == 0
        rows = capsys.readouterr().out.splitlines()
        (row,) = (row for row in rows if row.strip("│ ").startswith("weights"))
        sizes.append(float(row.split("│")[2].split()[0]))
    assert 0.5 < sizes[0] / sizes[1] < 0.6


@pytest.mark.parametrize("full", [False, True])
def test_the_transformer_itself_is_trained_in_float32(cached: Cached, tmp_path: Path, full: bool) -> None:
    """With --full-bf16 what is trained is kept in bfloat16 still."""
    line = whole.words(cached, tmp_path, "--max-train-steps 2 --optimizer-type sgd")
    place = line.index("--dtype")
    line[place : place + 2] = ["--full-bf16"] if full else ["--dtype", "bfloat16"]
    assert main([*line, "--save-precision", "float32"]) == 0
    after = whole.weights(tmp_path / "edit.safetensors")
    narrow = [torch.equal(tensor, tensor.bfloat16().float()) for tensor in after.values()]
    assert all(narrow) if full else not any(narrow)
