"""Uploads of a run, and going on from a state on the hub, against a hub that is a folder."""

import re
import shutil
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from tests.training.command import train
from tests.training.dataset import Cached

TOKEN = "hf_sEcReT"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the hub; it knows one token."""
    root = tmp_path / "hub"

    class Api:
        def __init__(self, token: str | None) -> None:
            self.token = token

        def create_repo(self, name: str, **_: Any) -> None:
            if self.token != TOKEN:
                raise PermissionError(f"the token {self.token} is not known")
            (root / name).mkdir(parents=True)

        def upload_file(
            self, *, path_or_fileobj: Path, path_in_repo: str, repo_id: str, repo_type: str
        ) -> None:
            (root / repo_id / path_in_repo).parent.mkdir(exist_ok=True)
            shutil.copy(path_or_fileobj, root / repo_id / path_in_repo)

        def upload_folder(
            self, *, folder_path: Path, path_in_repo: str, repo_id: str, repo_type: str
        ) -> None:
            shutil.copytree(folder_path, root / repo_id / path_in_repo)

    def download(
        repo: str, name: str, *, revision: str | None, repo_type: str | None, token: str | None
    ) -> str:
        assert (revision, repo_type, token) == ("main", "model", TOKEN)
        found = root / repo / name
        if not found.is_file():
            raise FileNotFoundError(f"404: {name}")
        return str(found)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return root


def test_a_run_is_uploaded_and_goes_on_from_the_hub(
    hub: Path, cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = f"--huggingface-repo-id me/edit --huggingface-path-in-repo runs --huggingface-token {TOKEN}"
    steps = "--max-train-steps 4 --save-every-n-steps 2 --save-state --ema-decay 0.9"
    whole = tmp_path / "whole"
    assert train(cached, whole, f"{steps} {where} --save-state-to-huggingface --async-upload") == 0
    ours = {path.name for path in whole.iterdir() if path.suffix not in (".html", ".jsonl")}
    assert {path.name for path in (hub / "me/edit/runs").iterdir()} == ours and len(ours) == 9
    for path in (hub / "me/edit/runs").glob("*.safetensors"):
        assert path.read_bytes() == (whole / path.name).read_bytes()

    again = tmp_path / "again"
    state = "--resume me/edit/runs/edit-step00000002-state:main:model --resume-from-huggingface"
    assert train(cached, again, f"{steps} {state} --huggingface-token {TOKEN}") == 0
    assert (again / "edit.safetensors").read_bytes() == (whole / "edit.safetensors").read_bytes()
    written = [path for folder in (whole, again) for path in folder.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)
    assert TOKEN not in "".join(capsys.readouterr())


def test_states_stay_here_unless_asked_for_and_failures_end_nothing(
    hub: Path, cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = "--max-train-steps 1 --save-state --huggingface-repo-id me/edit"
    assert train(cached, tmp_path / "a", f"{settings} --huggingface-token {TOKEN}") == 0
    assert [path.name for path in (hub / "me/edit").iterdir()] == ["edit.safetensors"]
    assert train(cached, tmp_path / "b", f"{settings} --huggingface-token hf_wrong") == 0
    told = capsys.readouterr().err
    assert "The repository me/edit cannot be made: the token *** is not known" in told
    assert (tmp_path / "b" / "edit.safetensors").exists()


def test_a_save_can_wait_for_its_upload(
    hub: Path, cached: Cached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else files that are not kept for long may be gone when their turn comes."""
    at_once = huggingface_hub.HfApi.upload_file

    def upload_file(api: Any, **what: Any) -> None:
        time.sleep(0.2)
        at_once(api, **what)

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_file", upload_file)
    settings = "--max-train-steps 3 --save-every-n-steps 1 --save-last-n-steps 1 --no-async-upload"
    where = f"--huggingface-repo-id me/edit --huggingface-token {TOKEN}"
    assert train(cached, tmp_path / "out", f"{settings} {where}") == 0
    uploaded = {path.name for path in (hub / "me/edit").iterdir()}
    assert uploaded == {"edit.safetensors", *(f"edit-step{step:08d}.safetensors" for step in (1, 2, 3))}
    assert not (tmp_path / "out" / "edit-step00000001.safetensors").exists()


@pytest.mark.parametrize(
    ("resume", "message"),
    [
        ("me/edit", "must be OWNER/NAME/PATH"),
        ("me/edit/no-state:main:model", "cannot be fetched.*404: no-state"),
    ],
)
def test_a_state_that_is_not_on_the_hub_is_named(
    resume: str, message: str, hub: Path, cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = f"--max-train-steps 1 --resume {resume} --resume-from-huggingface --huggingface-token {TOKEN}"
    assert train(cached, tmp_path / "out", settings) == 2
    assert re.search(message, capsys.readouterr().err)
