import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from kontext.cli import main
from tests.training.command import files, metadata, train, words
from tests.training.dataset import Cached

MUSUBI_FIELDS = """
    ss_session_id ss_output_name ss_learning_rate ss_num_train_items ss_num_batches_per_epoch ss_num_epochs
    ss_gradient_checkpointing ss_gradient_checkpointing_cpu_offload ss_gradient_accumulation_steps
    ss_max_train_steps ss_lr_warmup_steps ss_lr_scheduler ss_base_model_version ss_network_module ss_network_dim
    ss_network_alpha ss_network_dropout ss_mixed_precision ss_seed ss_training_comment ss_optimizer
    ss_max_grad_norm ss_fp8_base ss_full_fp16 ss_full_bf16 ss_weighting_scheme ss_logit_mean ss_logit_std
    ss_mode_scale ss_guidance_scale ss_timestep_sampling ss_sigmoid_scale ss_discrete_flow_shift ss_datasets
    ss_network_args ss_sd_model_name ss_vae_name ss_steps ss_epoch sshs_model_hash sshs_legacy_hash
"""
TIMES = {"ss_training_started_at", "ss_training_finished_at", "modelspec.date"}


@pytest.fixture(scope="module")
def made(cached: Cached, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with dropout that saved each, with its state and logs. Treat the files as read-only."""
    folder = tmp_path_factory.mktemp("made")
    settings = f"--max-train-steps 3 --network-dropout 0.1 --logging-dir {folder}/logs"
    assert train(cached, folder, f"{settings} --save-every-n-steps 1 --save-state") == 0
    return folder


def test_a_run_from_start_to_file(cached: Cached, tmp_path: Path) -> None:
    """Over epochs, of whose files older ones are deleted again."""
    epochs = "--max-train-epochs 4 --save-every-n-epochs 1 --save-last-n-epochs 2"
    assert train(cached, tmp_path, f"{epochs} --save-state --save-last-n-epochs-state 1") == 0
    assert files(tmp_path) == [
        "edit-000002.safetensors", "edit-000003-state", "edit-000003.safetensors", "edit-state", "edit.safetensors",
    ]  # fmt: skip
    assert metadata(tmp_path / "edit.safetensors")["ss_steps"] == "12"
    tensors = load_file(tmp_path / "edit.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if "up" in name)


def test_metadata_is_complete_and_true(cached: Cached, tmp_path: Path) -> None:
    settings = "--max-train-epochs 1 --network-args exclude_patterns=.*mlp.* --training-comment hello"
    assert train(cached, tmp_path, f"{settings} --save-precision bf16 --metadata-time") == 0
    told = metadata(tmp_path / "edit.safetensors")
    assert set(MUSUBI_FIELDS.split()) | TIMES <= set(told)
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
    assert train(cached, tmp_path, "--max-train-steps 1 --no-metadata") == 0
    told = metadata(tmp_path / "edit.safetensors")
    assert "ss_network_dim" in told and "ss_seed" not in told and not TIMES & set(told)


def test_training_starts_from_given_weights(cached: Cached, made: Path, tmp_path: Path) -> None:
    before = made / "edit.safetensors"
    again = f"--network-weights {before} --learning-rate 1e-12 --max-train-steps 1"
    assert train(cached, tmp_path, again) == 0
    old, new = load_file(before), load_file(tmp_path / "edit.safetensors")
    for name, tensor in old.items():
        torch.testing.assert_close(new[name], tensor)


def test_missing_caches_name_the_command(
    cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "d.toml"
    config.write_text(cached.config.read_text().replace("/cache'", "/nocache'"))
    line = [str(config) if word == str(cached.config) else word for word in words(cached, tmp_path, "")]
    assert main(line) == 2
    assert "kontext cache-latents" in capsys.readouterr().err


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


def test_resuming_with_other_settings(
    cached: Cached, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = f"--network-dropout 0.1 --resume {made}/edit-state --max-train-steps 4"
    assert train(cached, tmp_path, f"{state} --network-dim 8") == 2
    assert "network_dim was 4, now 8" in capsys.readouterr().err
    assert train(cached, tmp_path, f"{state} --max-train-steps 1") == 2
    assert "3 steps are done already" in capsys.readouterr().err
    assert train(cached, tmp_path, f"{state} --max-train-steps 3") == 0
    assert "All steps of this run are done" in capsys.readouterr().err
    assert train(cached, tmp_path, f"{state} --learning-rate 2e-3") == 0
    assert "learning_rate was 0.001, now 0.002: the run goes on" in capsys.readouterr().err


def test_resuming_with_another_dropout_of_references(
    cached: Cached, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "d.toml"
    config.write_text(cached.config.read_text() + "control_dropout_rate = 0.5\n")
    line = words(cached, tmp_path, f"--network-dropout 0.1 --resume {made}/edit-state --max-train-steps 4")
    assert main([str(config) if word == str(cached.config) else word for word in line]) == 0
    told = "caption and reference dropout was [[0.0, 0.0]], now [[0.0, 0.5]]: the run goes on"
    assert told in capsys.readouterr().err


def test_a_torn_state_is_ignored_for_the_one_before(cached: Cached, made: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(made, copy)
    assert files(copy)[-2] == "edit.safetensors"  # behind it come the logs
    for folder in ("edit-state", "edit-step00000003-state"):
        path = copy / folder / "state.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
    (copy / "edit.safetensors").unlink()
    assert train(cached, copy, "--network-dropout 0.1 --max-train-steps 3 --resume auto") == 0
    assert (copy / "edit.safetensors").read_bytes() == (made / "edit.safetensors").read_bytes()


def test_samples_change_nothing_and_are_drawn(
    cached: Cached, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kontext.data.images.PREFERRED_RESOLUTIONS", ((64, 64), (96, 64)))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        f"make the circle red --w 64 --h 64 --s 2 --ci {cached.reference}\nremove it --w 64 --h 80 --s 2\n"
    )
    samples = f"--sample-prompts {prompts} --sample-every-n-steps 2 --sample-at-first"
    assert train(cached, tmp_path, f"--max-train-steps 3 --network-dropout 0.1 {samples}") == 0
    assert (tmp_path / "edit.safetensors").read_bytes() == (made / "edit.safetensors").read_bytes()
    folder = tmp_path / "sample"
    names = files(folder)
    assert len(names) == 6
    assert {"edit_000000_grid.png", "edit_000002_grid.png"} < set(names)
    assert Image.open(folder / names[0]).size == (64, 64)
    first, later = (Image.open(folder / f"edit_00000{i}_grid.png") for i in (0, 2))
    assert first.size == later.size and first.tobytes() != later.tobytes()


def logged(folder: Path, name: str) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = folder.glob("logs/*/kontext/events*")
    log = EventAccumulator(str(events))
    log.Reload()
    assert [event.step for event in log.Scalars("loss/current")] == [1, 2, 3]
    return [event.value for event in log.Scalars(name)]


def test_tensorboard_reads_the_logs(made: Path) -> None:
    assert len(logged(made, "grad_norm")) == 3 and min(logged(made, "adapter_norm")) > 0
    assert logged(made, "lr/group0") == pytest.approx([1e-3] * 3)


def test_a_loss_that_is_no_number_ends_the_run(
    cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate this high makes the first update overflow."""
    settings = "--max-train-steps 4 --learning-rate 1e30 --optimizer-type sgd --max-grad-norm 0"
    assert train(cached, tmp_path, f"{settings} --save-every-n-steps 1 --save-state") == 2
    told = capsys.readouterr().err
    assert "The loss became" in told and "timestep" in told and "edit-step00000001-state" in told
    assert not (tmp_path / "edit.safetensors").exists()


def test_norms_are_limited_and_useless_settings_told(
    cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    most = 1e-3
    settings = f"--max-train-steps 3 --learning-rate 0.02 --network-alpha 2 --scale-weight-norms {most}"
    assert train(cached, tmp_path, f"{settings} --logging-dir {tmp_path}/logs") == 0
    assert "learning rate of 0.02" in capsys.readouterr().err
    tensors = load_file(tmp_path / "edit.safetensors")
    norms = [
        (0.5 * up @ tensors[name.replace("lora_up", "lora_down")]).norm()
        for name, up in tensors.items()
        if "lora_up" in name
    ]
    assert max(norms) == pytest.approx(most, rel=1e-4) and len(norms) == 20
    assert logged(tmp_path, "max_norm/keys_scaled")[-1] == 20
    dora = "--max-train-steps 1 --network-args dora=true --scale-weight-norms 1"
    assert train(cached, tmp_path / "dora", dora) == 2
    assert "a DoRA learns the lengths" in capsys.readouterr().err


def test_an_average_is_saved_beside_and_changes_nothing(cached: Cached, made: Path, tmp_path: Path) -> None:
    """Each average is the mean of those saved at each step, by the formula; older ones are deleted too."""
    settings = "--max-train-steps 3 --network-dropout 0.1 --ema-decay 0.3"
    assert train(cached, tmp_path, f"{settings} --save-every-n-steps 1 --save-last-n-steps 1") == 0
    assert files(tmp_path) == [
        "edit-ema.safetensors", "edit-step00000002-ema.safetensors", "edit-step00000002.safetensors",
        "edit-step00000003-ema.safetensors", "edit-step00000003.safetensors", "edit.safetensors",
    ]  # fmt: skip
    steps = [load_file(made / f"edit-step0000000{step}.safetensors") for step in (1, 2, 3)]
    averages = [load_file(tmp_path / f"edit-step0000000{step}-ema.safetensors") for step in (2, 3)]
    plain, last = (load_file(tmp_path / f"edit{ending}.safetensors") for ending in ("", "-ema"))
    for name, tensor in last.items():
        assert torch.equal(plain[name], steps[2][name])
        torch.testing.assert_close(tensor, 0.3 * averages[0][name] + 0.7 * steps[2][name])
        if "up" in name:  # these start at zero
            torch.testing.assert_close(
                averages[0][name], 0.25 * 9 / 11 * steps[0][name] + 0.75 * steps[1][name]
            )
    assert metadata(tmp_path / "edit-ema.safetensors")["ss_ema_decay"] == "0.3"


def test_a_schedule_free_run_saves_its_average(cached: Cached, tmp_path: Path) -> None:
    """x = (y - (1 - beta) z) / beta, with y and z in the state."""
    assert train(cached, tmp_path, "--max-train-steps 4 --optimizer-type adamwschedulefree --save-state") == 0
    adapter, state = (
        load_file(tmp_path / name) for name in ("edit.safetensors", "edit-state/state.safetensors")
    )
    others = [value for name, value in state.items() if name.endswith(".z")]
    for name in (name for name in state if name.startswith("adapter.")):
        module, part = name.removeprefix("adapter.").split(".lora_")
        saved, y = adapter[f"lora_unet_{module.replace('.', '_')}.lora_{part}"], state[name]
        averages = [(y - 0.1 * z) / 0.9 for z in others if z.shape == y.shape]
        assert sum(torch.allclose(saved, average, rtol=1e-4, atol=1e-7) for average in averages) == 1
        assert not torch.allclose(saved, y, rtol=1e-4, atol=1e-7)


def test_noise_levels_are_shown_and_nothing_is_trained(
    cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(cached, tmp_path, "--show-timesteps image --weighting-scheme cosmap") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["edit-timesteps.png"]
    assert Image.open(tmp_path / "edit-timesteps.png").size == (1000, 480)
    capsys.readouterr()
    assert train(cached, tmp_path, "--show-timesteps console --timestep-sampling uniform") == 0
    told = capsys.readouterr().out
    assert "950-1000" in told and told.count("5.00%") == 20
    assert len(list(tmp_path.iterdir())) == 1


def test_schedulers_take_arguments(cached: Cached, tmp_path: Path) -> None:
    """The learning rates of three steps, as the history of the run has them."""
    for settings, rates in (
        ("--lr-scheduler polynomial --lr-scheduler-args lr_end=4e-4 power=1", [1e-3, 8e-4, 6e-4]),
        (
            "--lr-scheduler-type torch.optim.lr_scheduler.StepLR --lr-scheduler-args step_size=1 gamma=0.5",
            [1e-3, 5e-4, 2.5e-4],
        ),
    ):
        assert train(cached, tmp_path, f"--max-train-steps 3 {settings}") == 0
        lines = [json.loads(line) for line in (tmp_path / "edit.history.jsonl").read_text().splitlines()]
        assert [line["rates"][0] for line in lines if "rates" in line] == pytest.approx(rates)
