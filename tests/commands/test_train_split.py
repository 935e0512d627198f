"""The transformer itself trained by two processes: each with its own, or with parts of one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kontext.commands.train_whole import SPLITTABLE, is_split
from kontext.errors import UserError
from kontext.options.resolve import resolve
from kontext.options.train import Train
from tests.tiny import TinyFiles
from tests.training.command import files
from tests.training.dataset import Cached
from tests.training.whole import on, train, weights, with_validation, words


def launched(line: list[str], kind: str) -> subprocess.Popen[str]:
    launch = f"{kind} --num_processes 2 --num_machines 1 --dynamo_backend no --mixed_precision no -m kontext"
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *line], env=environment, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> str:
    """What it told."""
    _, told = process.communicate(timeout=180)
    assert process.returncode == 0, told
    return told


def assert_as_far(base: Path, found: Path, expected: Path) -> None:
    """Both have come the same way from the base, but for rounding."""
    start, there, wanted = weights(base), weights(found), weights(expected)
    for name, tensor in wanted.items():
        assert (there[name] - tensor).norm() < 1e-3 * (tensor - start[name]).norm(), name


@pytest.mark.slow
def test_two_processes_train_as_one(cached: Cached, tiny_files: TinyFiles, tmp_path: Path) -> None:
    settings = "--max-train-epochs 1 --no-report"
    process = launched(words(cached, tmp_path / "two", settings), "--multi_gpu")
    assert train(cached, tmp_path / "one", f"{settings} --gradient-accumulation-steps 2") == 0
    assert process.wait(timeout=180) == 0
    assert_as_far(
        tiny_files.dit, tmp_path / "two" / "edit.safetensors", tmp_path / "one" / "edit.safetensors"
    )


def test_two_processes_share_one_model(cached: Cached, tiny_files: TinyFiles, tmp_path: Path) -> None:
    """FSDP: the same files as one process writes, but for rounding. Its state goes on in one process."""
    there = on(with_validation(cached, tmp_path), tiny_files, tiny_files.dit_sharded)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("remove it --w 64 --h 64 --s 2\n")
    settings = (
        f"--max-train-epochs 2 --save-every-n-epochs 1 --save-state --ema-decay 0.9 --gradient-checkpointing "
        f"--sample-prompts {prompts} --sample-every-n-epochs 1"
    )
    one, two = tmp_path / "one", tmp_path / "two"
    process = launched(words(there, two, settings), "--use_fsdp")
    assert train(there, one, f"{settings} --gradient-accumulation-steps 2") == 0
    assert "2 processes share one model" in ended(process)
    assert files(one) == files(two) and len(files(one / "sample")) == len(files(two / "sample"))
    saved = [name for name in files(one) if "state" not in name and name != "sample"]
    assert {"edit", "edit-ema", "edit-best", "edit-000001"} <= set(saved)
    for name in saved:
        assert_as_far(tiny_files.dit_sharded, two / name, one / name)
    losses = [
        [json.loads(line) for line in (d / "edit.history.jsonl").read_text().splitlines()] for d in (one, two)
    ]
    for a, b in zip(*losses, strict=True):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-4)
    shutil.copytree(two / "edit-000001-state", tmp_path / "state")
    again = f"--resume {tmp_path}/state --gradient-accumulation-steps 2"
    assert train(there, tmp_path / "next", f"{settings} {again}") == 0
    for name in ("edit", "edit-ema"):
        assert_as_far(tiny_files.dit_sharded, tmp_path / "next" / name, one / name)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"network_module": "lora"}, "FSDP is for --network-module none"),
        ({"optimizer_type": "adafactor"}, "adafactor treats .* Use adamw, adamwschedulefree or sgd"),
        ({"optimizer_type": "adamw8bit"}, "adamw8bit treats .* Use adamw, .* or launch without --use_fsdp"),
        ({"optimizer_type": "lion8bit"}, "lion8bit treats .*--full-bf16 halves"),
    ],
)
def test_what_does_not_go_with_a_shared_model_is_refused(
    settings: dict[str, str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = {"dit": tmp_path, "dataset_config": tmp_path, "output_dir": tmp_path, "output_name": "edit"}
    options = resolve(Train, {"network_module": "none"} | needed | settings)
    assert not is_split(options, SimpleNamespace(size=2))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not is_split(options, SimpleNamespace(size=1))
    with pytest.raises(UserError, match=told):
        is_split(options, SimpleNamespace(size=2))


@pytest.mark.parametrize("name", SPLITTABLE)
def test_the_optimizers_named_instead_go_with_a_shared_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = {"dit": tmp_path, "dataset_config": tmp_path, "output_dir": tmp_path, "output_name": "edit"}
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert is_split(
        resolve(Train, {"network_module": "none", "optimizer_type": name} | needed), SimpleNamespace(size=2)
    )
