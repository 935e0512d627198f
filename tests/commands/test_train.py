import json
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
    """What a run has written, but for its report and history."""
    return sorted(path.name for path in folder.iterdir() if path.suffix not in (".html", ".jsonl"))


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_a_run_from_start_to_file(cached: Cached, tmp_path: Path) -> None:
    assert main(words(cached, tmp_path, "--max-train-epochs", "2", "--save-every-n-epochs", "1")) == 0
    assert files(tmp_path) == ["edit-000001.safetensors", "edit.safetensors"]
    assert metadata(tmp_path / "edit.safetensors")["ss_steps"] == "6"
    assert any(
        tensor.abs().max() > 0
        for name, tensor in load_file(tmp_path / "edit.safetensors").items()
        if "up" in name
    )


MUSUBI_FIELDS = [
    "ss_session_id",
    "ss_output_name",
    "ss_learning_rate",
    "ss_num_train_items",
    "ss_num_batches_per_epoch",
    "ss_num_epochs",
    "ss_gradient_checkpointing",
    "ss_gradient_checkpointing_cpu_offload",
    "ss_gradient_accumulation_steps",
    "ss_max_train_steps",
    "ss_lr_warmup_steps",
    "ss_lr_scheduler",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_dropout",
    "ss_mixed_precision",
    "ss_seed",
    "ss_training_comment",
    "ss_optimizer",
    "ss_max_grad_norm",
    "ss_fp8_base",
    "ss_full_fp16",
    "ss_full_bf16",
    "ss_weighting_scheme",
    "ss_logit_mean",
    "ss_logit_std",
    "ss_mode_scale",
    "ss_guidance_scale",
    "ss_timestep_sampling",
    "ss_sigmoid_scale",
    "ss_discrete_flow_shift",
    "ss_datasets",
    "ss_network_args",
    "ss_sd_model_name",
    "ss_vae_name",
    "ss_steps",
    "ss_epoch",
    "sshs_model_hash",
    "sshs_legacy_hash",
]
TIMES = {"ss_training_started_at", "ss_training_finished_at", "modelspec.date"}


def test_metadata_is_complete_and_true(cached: Cached, tmp_path: Path) -> None:
    steps = [
        "--max-train-epochs",
        "1",
        "--network-args",
        "exclude_patterns=.*mlp.*",
        "--training-comment",
        "hello",
    ]
    assert main(words(cached, tmp_path, *steps, "--save-precision", "bf16", "--metadata-time")) == 0
    told = metadata(tmp_path / "edit.safetensors")
    assert set(MUSUBI_FIELDS) | TIMES <= set(told)
    assert {name: told[f"ss_{name}"] for name in ("network_dim", "network_alpha", "num_train_items", "epoch")} == {
        "network_dim": "4", "network_alpha": "4", "num_train_items": "5", "epoch": "1",
    }  # fmt: skip
    assert told["ss_network_args"] == '{"exclude_patterns": ".*mlp.*"}'
    assert told["ss_training_comment"] == "hello"
    assert told["ss_network_module"] == "networks.lora_flux"
    assert told["modelspec.resolution"] == "80x64"
    (dataset,) = json.loads(told["ss_datasets"])
    assert dataset["has_control"] and dataset["resolution"] == [80, 64]
    tensors = load_file(tmp_path / "edit.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert not any("mlp" in name for name in tensors)


def test_files_can_be_silent_about_training(cached: Cached, tmp_path: Path) -> None:
    assert main(words(cached, tmp_path, "--max-train-steps", "1", "--no-metadata")) == 0
    told = metadata(tmp_path / "edit.safetensors")
    assert "ss_network_dim" in told and "ss_seed" not in told and not TIMES & set(told)


def test_training_starts_from_given_weights(cached: Cached, tmp_path: Path) -> None:
    assert main(words(cached, tmp_path, "--max-train-steps", "3")) == 0
    before = tmp_path / "edit.safetensors"
    again = ["--network-weights", str(before), "--learning-rate", "1e-12", "--max-train-steps", "1"]
    assert main(words(cached, tmp_path / "next", *again)) == 0
    old, new = load_file(before), load_file(tmp_path / "next" / "edit.safetensors")
    for name, tensor in old.items():
        torch.testing.assert_close(new[name], tensor)


def test_missing_caches_name_the_command(
    cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "d.toml"
    config.write_text(cached.config.read_text().replace("/cache'", "/nocache'"))
    line = [str(config) if word == str(cached.config) else word for word in words(cached, tmp_path)]
    assert main(line) == 2
    assert "kontext cache-latents" in capsys.readouterr().err


def test_two_processes_train_as_one(cached: Cached, tmp_path: Path) -> None:
    """The same batches in a step, shared by two processes or taken one after the other."""
    line = ["--max-train-epochs", "2", "--network-dropout", "0.1"]
    assert main(words(cached, tmp_path / "one", *line, "--gradient-accumulation-steps", "2")) == 0
    launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--dynamo_backend", "no"]
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *launch,
        "--mixed_precision",
        "no",
        "-m",
        "kontext",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, *words(cached, tmp_path / "two", *line)], check=True, env=environment, timeout=180
    )
    one, two = (load_file(tmp_path / name / "edit.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-8)


def test_the_published_command_line_runs(cached: Cached, tmp_path: Path, tiny_files: Any) -> None:
    """musubi-tuner's command for Kontext, with the script's path replaced by `kontext train`."""
    line = (
        f"train --dit {tiny_files.dit} --vae {tiny_files.vae} --text_encoder1 {tiny_files.t5} "
        f"--text_encoder2 {tiny_files.clip} --dataset_config {cached.config} --sdpa --mixed_precision bf16 "
        "--timestep_sampling flux_shift --weighting_scheme none --optimizer_type adamw8bit --learning_rate 1e-4 "
        "--gradient_checkpointing --max_data_loader_n_workers 2 --persistent_data_loader_workers "
        "--network_module networks.lora_flux --network_dim 32 --max_train_epochs 2 --save_every_n_epochs 1 --seed 42 "
        f"--output_dir {tmp_path} --output_name name-of-lora"
    )
    assert main([*line.split(), "--device", "cpu"]) == 0
    assert files(tmp_path) == ["name-of-lora-000001.safetensors", "name-of-lora.safetensors"]
    told = metadata(tmp_path / "name-of-lora.safetensors")
    assert told["ss_mixed_precision"] == "bf16"
    assert told["ss_optimizer"].startswith("bitsandbytes.optim.adamw.AdamW8bit")


RESUMED = {
    "adamw": ["--gradient-accumulation-steps", "2", "--network-dropout", "0.1", "--lr-scheduler", "cosine"],
    "adamw8bit": ["--optimizer-type", "adamw8bit", "--network-dim", "64", "--max-data-loader-n-workers", "1"],
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_writes_the_same_bytes(name: str, cached: Cached, tmp_path: Path) -> None:
    settings = [*RESUMED[name], "--max-train-steps", "5", "--save-every-n-steps", "3", "--save-state"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(words(cached, whole, *settings)) == 0
    assert main(words(cached, broken, *settings)) == 0
    for path in (*broken.glob("edit-state/*"), broken / "edit.safetensors"):
        path.unlink()
    assert main(words(cached, broken, *settings, "--resume", "auto")) == 0
    assert (broken / "edit.safetensors").read_bytes() == (whole / "edit.safetensors").read_bytes()


def test_resuming_with_other_settings(
    cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(cached, tmp_path, "--max-train-steps", "2", "--save-state")) == 0
    state = ["--resume", str(tmp_path / "edit-state"), "--max-train-steps", "3"]
    capsys.readouterr()
    assert main(words(cached, tmp_path, *state, "--network-dim", "8")) == 2
    assert "network_dim was 4, now 8" in capsys.readouterr().err
    assert main(words(cached, tmp_path, *state, "--max-train-steps", "1")) == 2
    assert "2 steps are done already" in capsys.readouterr().err
    assert main(words(cached, tmp_path, *state, "--learning-rate", "2e-3")) == 0
    assert "learning_rate was 0.001, now 0.002: the run goes on" in capsys.readouterr().err


def test_a_torn_state_is_ignored_for_the_one_before(cached: Cached, tmp_path: Path) -> None:
    assert (
        main(words(cached, tmp_path, "--max-train-steps", "3", "--save-every-n-steps", "1", "--save-state"))
        == 0
    )
    assert files(tmp_path)[-1] == "edit.safetensors"
    for folder in ("edit-state", "edit-step00000003-state"):
        path = tmp_path / folder / "state.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
    before = (tmp_path / "edit.safetensors").read_bytes()
    (tmp_path / "edit.safetensors").unlink()
    assert main(words(cached, tmp_path, "--max-train-steps", "3", "--resume", "auto")) == 0
    assert (tmp_path / "edit.safetensors").read_bytes() == before


def test_samples_change_nothing_and_are_drawn(
    cached: Cached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kontext.data.images.PREFERRED_RESOLUTIONS", ((64, 64), (96, 64)))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        f"make the circle red --w 64 --h 64 --s 2 --ci {cached.reference}\nremove it --w 64 --h 80 --s 2\n"
    )
    steps = ["--max-train-steps", "3", "--network-dropout", "0.1"]
    samples = ["--sample-prompts", str(prompts), "--sample-every-n-steps", "2", "--sample-at-first"]
    assert main(words(cached, tmp_path / "plain", *steps)) == 0
    assert main(words(cached, tmp_path / "drawn", *steps, *samples)) == 0
    plain, drawn = ((tmp_path / name / "edit.safetensors").read_bytes() for name in ("plain", "drawn"))
    assert plain == drawn
    names = files(tmp_path / "drawn" / "sample")
    assert len(names) == 6
    assert {"edit_000000_grid.png", "edit_000002_grid.png"} < set(names)
    assert Image.open(tmp_path / "drawn" / "sample" / names[0]).size == (64, 64)
    first, later = (Image.open(tmp_path / "drawn" / "sample" / f"edit_00000{i}_grid.png") for i in (0, 2))
    assert first.size == later.size and first.tobytes() != later.tobytes()


def test_keep_last_deletes_older_files(cached: Cached, tmp_path: Path) -> None:
    epochs = ["--max-train-epochs", "4", "--save-every-n-epochs", "1", "--save-last-n-epochs", "2"]
    assert main(words(cached, tmp_path, *epochs, "--save-state", "--save-last-n-epochs-state", "1")) == 0
    assert files(tmp_path) == [
        "edit-000002.safetensors", "edit-000003-state", "edit-000003.safetensors", "edit-state", "edit.safetensors",
    ]  # fmt: skip


def test_tensorboard_reads_the_logs(cached: Cached, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert (
        main(words(cached, tmp_path, "--max-train-steps", "3", "--logging-dir", str(tmp_path / "logs"))) == 0
    )
    (events,) = tmp_path.glob("logs/*/kontext/events*")
    log = EventAccumulator(str(events))
    log.Reload()
    assert [event.step for event in log.Scalars("loss/current")] == [1, 2, 3]


def start(cached: Cached, output: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "kontext", *words(cached, output, *more)]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_a_state_and_exits_130(number: int, cached: Cached, tmp_path: Path) -> None:
    process = start(
        cached, tmp_path, "--max-train-steps", "100000", "--save-every-n-steps", "2", "--save-state"
    )
    wait_for(tmp_path / "edit-step00000002-state" / "state.safetensors", process)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "Go on with --resume auto" in told


def test_a_killed_run_goes_on_to_the_same_bytes(cached: Cached, tmp_path: Path) -> None:
    settings = [
        "--max-train-steps",
        "60",
        "--save-every-n-steps",
        "5",
        "--save-state",
        "--save-last-n-steps",
        "5",
    ]
    killed = tmp_path / "killed"
    process = start(cached, killed, *settings)
    wait_for(killed / "edit-step00000010-state" / "state.safetensors", process)
    process.kill()
    process.communicate()
    assert not (killed / "edit.safetensors").exists()
    assert main(words(cached, killed, *settings, "--resume", "auto")) == 0
    assert main(words(cached, tmp_path / "whole", *settings)) == 0
    assert (killed / "edit.safetensors").read_bytes() == (
        tmp_path / "whole" / "edit.safetensors"
    ).read_bytes()
    assert files(killed) == files(tmp_path / "whole")


def test_a_loss_that_is_no_number_ends_the_run(
    cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate this high makes the first update overflow."""
    settings = [
        "--max-train-steps",
        "4",
        "--learning-rate",
        "1e30",
        "--optimizer-type",
        "sgd",
        "--max-grad-norm",
        "0",
    ]
    assert main(words(cached, tmp_path, *settings, "--save-every-n-steps", "1", "--save-state")) == 2
    told = capsys.readouterr().err
    assert "The loss became" in told and "timestep" in told and "edit-step00000001-state" in told
    assert not (tmp_path / "edit.safetensors").exists()
