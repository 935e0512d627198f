"""Logs through accelerate's trackers; Weights & Biases writes to a folder, without a network."""

import os
import struct
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.tracking import TensorBoardTracker
from wandb.proto import wandb_internal_pb2

from kontext.cli import main
from kontext.commands import train_logs
from kontext.options.train import Train
from tests.training.command import train, words
from tests.training.dataset import Cached

KEY, TOKEN = "0123456789abcdef0123456789abcdef01234567", "hf_sEcReT"


def options(**given: object) -> Train:
    return Train(dit="d", dataset_config="c", output_dir="o", output_name="n", **given)


BLOCK, HEAD = 2**15, 7  # of LevelDB's log format, in which wandb writes


def records(path: Path) -> Iterator[bytes]:
    """Records behind the file's head of 7 bytes: parts with checksum (4), length (2) and kind (full, first, middle, last)."""
    data, place, whole = path.read_bytes(), HEAD, b""
    while place + HEAD <= len(data):
        if BLOCK - place % BLOCK < HEAD:
            place += BLOCK - place % BLOCK
        length, kind = struct.unpack("<HB", data[place + 4 : place + HEAD])
        whole += data[place + HEAD : place + HEAD + length]
        place += HEAD + length
        if kind in (1, 4):
            yield whole
            whole = b""


def written_by_wandb(folder: Path) -> dict[str, list[str]]:
    """What is in the file of a run: its history by name, and its config.

    wandb's own process may fill the file a moment after the run has ended.
    """
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 20
    while "_step" not in (found := history(path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def history(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for data in records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        for item in record.history.item:
            found.setdefault("/".join(item.nested_key) or item.key, []).append(item.value_json)
        for item in (*record.run.config.update, *record.config.update):
            found.setdefault(f"config/{item.key}", []).append(item.value_json)
    return found


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_API_KEY", "")


@pytest.mark.usefixtures("offline")
def test_wandb_gets_all_values_and_no_secret(
    cached: Cached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """wandb logs the command line too: it must not find keys there."""
    more = tmp_path / "more.toml"
    more.write_text('[wandb]\nnotes = "a remark"\ntags = ["x"]\n')
    logs = tmp_path / "logs"
    settings = (
        f"--max-train-steps 3 --log-with all --logging-dir {logs} --log-tracker-config {more} --wandb-run-name one "
        f"--log-tracker-name mine --wandb-api-key {KEY} --huggingface-token={TOKEN}"
    )
    line = words(cached, tmp_path / "out", settings)
    monkeypatch.setattr(sys, "argv", ["kontext", *line])
    assert main(line) == 0
    assert os.environ["WANDB_API_KEY"] == KEY

    found = written_by_wandb(logs)
    for name in (
        "loss/current",
        "loss/average",
        "grad_norm",
        "lr/group0",
        "adapter_norm",
        "memory_gb",
        "_step",
    ):
        assert name in found, sorted(found)
    assert found["_step"] == ["1", "2", "3"]
    assert found["config/learning_rate"] == ['"0.001"'] and "config/wandb_api_key" not in found
    assert list(logs.glob("*/mine/events*"))
    everything = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    everything.append("".join(capfd.readouterr()).encode())
    for secret in (KEY, TOKEN):
        assert not any(secret.encode() in content for content in everything)
    assert any(b"a remark" in content for content in everything[:-1])


@pytest.mark.usefixtures("offline")
def test_options_are_not_logged_where_this_is_not_wanted(cached: Cached, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    settings = f"--max-train-steps 1 --log-with wandb --logging-dir {logs} --no-log-config"
    assert train(cached, tmp_path / "out", settings) == 0
    found = written_by_wandb(logs)
    assert "loss/current" in found and "config/learning_rate" not in found


def test_the_run_name_and_the_file_reach_wandb(tmp_path: Path) -> None:
    more = tmp_path / "more.toml"
    more.write_text('[wandb]\nname = "file"\nentity = "us"\n[tensorboard]\nflush_secs = 5\n')
    given = options(
        log_with="all", logging_dir=tmp_path / "logs", log_tracker_config=more, wandb_run_name="given"
    )
    assert train_logs.arguments(given, train_logs.trackers(given)) == {
        "wandb": {"name": "given", "entity": "us", "dir": str(tmp_path / "logs")},
        "tensorboard": {"flush_secs": 5},
    }


@pytest.mark.parametrize("failing", ["log", "finish"])
def test_a_logger_that_fails_ends_no_training(
    failing: str,
    cached: Cached,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A disk that is full, a network that is gone."""
    calls = []

    def full(*given: object, **named: object) -> None:
        calls.append(named.get("step"))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorBoardTracker, failing, full)
    assert train(cached, tmp_path / "out", f"--max-train-steps 3 --logging-dir {tmp_path}/logs") == 0
    assert calls == [1 if failing == "log" else None]
    assert "warning: tensorboard logs nothing more: [Errno 28] No space left" in capsys.readouterr().err
    assert (tmp_path / "out" / "edit.safetensors").exists()


def test_samples_are_logged(tmp_path: Path) -> None:
    from accelerate import Accelerator
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from kontext.training.team import Team

    team = Team(Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path))
    team.accelerator.init_trackers("mine")
    Image.new("RGB", (4, 2), "red").save(tmp_path / "a.png")
    heard = []
    train_logs.pictures(team, lambda *words: heard.append(words))(7, "e000001", [tmp_path / "a.png"])
    team.accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "mine"))
    events.Reload()
    (picture,) = events.Images(
        "sample_0/image/0" if "sample_0" not in events.Tags()["images"] else "sample_0"
    )
    assert (picture.step, picture.width, picture.height) == (7, 4, 2)
    assert heard == [(7, "e000001", [tmp_path / "a.png"])]


@pytest.mark.parametrize(
    ("text", "message"),
    [("[mlflow]\nx = 1\n", "'mlflow' is no table"), ("wandb = 1\n", "'wandb' is no"), ("x", "Expected")],
)
def test_a_bad_tracker_config_is_named(
    text: str, message: str, cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = tmp_path / "more.toml"
    more.write_text(text)
    settings = f"--max-train-steps 1 --logging-dir {tmp_path}/logs --log-tracker-config {more}"
    assert train(cached, tmp_path / "out", settings) == 2
    told = capsys.readouterr().err
    assert "more.toml" in told and message in told


def test_print_config_shows_no_secret(
    cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.toml"
    config.write_text(f'wandb-api-key = "{KEY}"\n')
    settings = f"--config-file {config} --huggingface-token {TOKEN} --print-config"
    assert train(cached, tmp_path / "out", settings) == 0
    told = "".join(capsys.readouterr())
    assert KEY not in told and TOKEN not in told
    assert "wandb-api-key" not in tomllib.loads(told) and "log-tracker-name" in tomllib.loads(told)
