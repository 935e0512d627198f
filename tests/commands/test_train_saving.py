"""LoRAs are written in the background: steps go on meanwhile, and neither the end nor an interrupt loses one."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from kontext.errors import UserError
from kontext.files import save_tensors
from kontext.training import trained
from kontext.training.history import read_history
from tests.training.command import files, train
from tests.training.dataset import Cached

SETTINGS = "--max-train-steps 12 --save-every-n-steps 4"


def test_steps_go_on_while_a_file_is_written(
    cached: Cached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file takes a second; what is in it are the weights of its step, though later steps have changed them."""
    assert train(cached, tmp_path / "quick", SETTINGS) == 0
    begun: dict[str, float] = {}

    def slow(path: Path, *content: Any) -> None:
        begun[path.name] = time.time()
        time.sleep(1)
        save_tensors(path, *content)

    monkeypatch.setattr(trained, "save_tensors", slow)
    assert train(cached, tmp_path / "slow", SETTINGS) == 0
    assert files(tmp_path / "slow") == files(tmp_path / "quick") and len(begun) == 4
    for name in begun:
        assert (tmp_path / "slow" / name).read_bytes() == (tmp_path / "quick" / name).read_bytes()
    history = read_history(tmp_path / "slow" / "edit.history.jsonl")
    assert history.time[-1] < begun["edit-step00000012.safetensors"]


def test_an_interrupt_waits_for_what_is_being_written(
    cached: Cached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path, *content: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        save_tensors(path, *content)

    monkeypatch.setattr(trained, "save_tensors", interrupted)
    assert train(cached, tmp_path, "--max-train-steps 10000 --save-every-n-steps 20") == 130
    state, adapter = sorted(files(tmp_path), key=len)
    assert adapter == "edit-step00000020.safetensors" and state.endswith("-state")


def test_a_full_disk_ends_the_run_with_its_message(
    cached: Cached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, *content: Any) -> None:
        raise UserError(f"Cannot write {path}: No space left on device.")

    monkeypatch.setattr(trained, "save_tensors", full)
    assert train(cached, tmp_path, "--max-train-steps 10000 --save-every-n-steps 20") == 2
    assert "edit-step00000020.safetensors: No space left on device." in capsys.readouterr().err
    assert "No space left on device" in (tmp_path / "edit.html").read_text(encoding="utf-8")
