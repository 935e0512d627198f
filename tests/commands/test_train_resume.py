"""Runs that are broken off or killed end as those that are not."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kontext.cli import main
from tests.training.command import files, train, words
from tests.training.dataset import Cached

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
RESUMED = {
    "adamw": "--gradient-accumulation-steps 2 --network-dropout 0.1 --lr-scheduler cosine",
    "average": "--ema-decay 0.9 --gradient-accumulation-steps 2",
    "adamw8bit": "--optimizer-type adamw8bit --optimizer-args min_8bit_size=256 --max-data-loader-n-workers 1",
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_writes_the_same_bytes(name: str, cached: Cached, tmp_path: Path) -> None:
    settings = f"{RESUMED[name]} --max-train-steps 5 --save-every-n-steps 3 --save-state"
    assert train(cached, tmp_path, settings) == 0
    adapters = ["edit.safetensors", "edit-ema.safetensors"] if name == "average" else ["edit.safetensors"]
    whole = [(tmp_path / adapter).read_bytes() for adapter in adapters]
    for path in (*tmp_path.glob("edit-state/*"), *(tmp_path / adapter for adapter in adapters)):
        path.unlink()
    assert train(cached, tmp_path, f"{settings} --resume auto") == 0
    assert [(tmp_path / adapter).read_bytes() for adapter in adapters] == whole


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_run_made_longer_is_told_when_its_learning_rates_would_have_been_others(
    schedule: str, cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = f"--lr-scheduler {schedule} --save-state --no-report"
    assert train(cached, tmp_path, f"{settings} --max-train-steps 2") == 0
    capsys.readouterr()
    assert train(cached, tmp_path, f"{settings} --max-train-epochs 1 --resume auto") == 0
    told = capsys.readouterr().err
    assert ("warning: max_train_steps was 2, now 3: the run goes on" in told) == (schedule == "cosine")
    assert ("warning" in told) == (schedule == "cosine")


def wait_for(path: Path, alive: threading.Event | None = None, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists() and (alive is None or alive.is_set()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_a_state_and_exits_130(
    number: signal.Signals, cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The signal comes from a thread while the run goes on in this process, as if from a terminal."""
    running = threading.Event()
    running.set()

    def interrupt() -> None:
        wait_for(tmp_path / "edit-step00000002-state" / "state.safetensors", running)
        if running.is_set():
            os.kill(os.getpid(), number)

    sender = threading.Thread(target=interrupt)
    sender.start()
    code = train(cached, tmp_path, "--max-train-steps 10000 --save-every-n-steps 2 --save-state")
    running.clear()
    sender.join()
    assert code == 130
    assert "Go on with --resume auto" in capsys.readouterr().err


def test_a_signal_to_all_processes_of_a_run_saves_a_state(cached: Cached, tmp_path: Path) -> None:
    """The loading ones live on while the step ends; the main one hears it twice, as from `timeout` and from torchrun."""
    settings = "--max-train-steps 100000 --max-data-loader-n-workers 1 --save-state"
    process = subprocess.Popen(
        [sys.executable, "-m", "kontext", *words(cached, tmp_path, settings)],
        env=ENVIRONMENT,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    history, deadline = tmp_path / "edit.history.jsonl", time.monotonic() + 90
    while not (history.exists() and '"loss"' in history.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 130, told
    (state,) = tmp_path.glob("edit-step*-state/state.safetensors")
    assert f"Saved {state.parent}. Go on with --resume auto." in told


def test_a_killed_run_goes_on_to_the_same_bytes(cached: Cached, tmp_path: Path) -> None:
    settings = "--max-train-steps 40 --save-every-n-steps 4 --save-state --save-last-n-steps 4"
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, "-m", "kontext", *words(cached, killed, settings)], env=ENVIRONMENT
    )
    wait_for(killed / "edit-step00000008-state" / "state.safetensors")
    process.kill()
    process.wait()
    assert not (killed / "edit.safetensors").exists()
    assert train(cached, killed, f"{settings} --resume auto") == 0
    assert train(cached, whole, settings) == 0
    assert (killed / "edit.safetensors").read_bytes() == (whole / "edit.safetensors").read_bytes()
    assert files(killed) == files(whole)


def test_pictures_that_were_edited_meanwhile_are_told(
    cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under the names and sizes that they had: else a state of the old ones would be as good as one of the new."""
    root, config = tmp_path / "data", tmp_path / "data" / "dataset.toml"
    shutil.copytree(cached.config.parent, root)
    config.write_text(cached.config.read_text().replace(str(cached.config.parent), str(root)))
    there = dataclasses.replace(
        cached, config=config, models=[str(config) if w == str(cached.config) else w for w in cached.models]
    )
    vae = cached.models[cached.models.index("--vae") + 1]
    cache = f"cache-latents --dataset-config {config} --vae {vae} --device cpu --num-workers 0".split()
    assert main(cache) == 0
    settings = "--max-train-steps 1 --save-state --no-report"
    assert train(there, tmp_path / "out", settings) == 0
    os.utime(root / "before" / "0.png")
    assert train(there, tmp_path / "out", f"{settings} --resume auto") == 0
    assert "warning" not in capsys.readouterr().err, "it is the same picture"
    shutil.copy(root / "before" / "2.png", root / "before" / "0.png")
    assert main(cache) == 0
    assert train(there, tmp_path / "out", f"{settings} --resume auto") == 0
    assert "warning: pictures and encoders was " in capsys.readouterr().err
