import threading
from pathlib import Path

import pytest

from kontext.training.upload import Repository, Uploads


class Hub:
    """Stands for HfApi: notes what it is asked, and fails for names with `bad` in them."""

    def __init__(self) -> None:
        self.asked: list[tuple] = []
        self.free = threading.Event()
        self.free.set()

    def create_repo(self, name: str, *, repo_type: str, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.asked.append(("create", name, repo_type, private))

    def upload_file(self, *, path_or_fileobj: Path, path_in_repo: str, repo_id: str, repo_type: str) -> None:
        self.free.wait()
        if "bad" in path_in_repo:
            raise RuntimeError(f"401 for\nhf_secret at {path_in_repo}")
        self.asked.append(("file", repo_id, repo_type, path_in_repo, path_or_fileobj.read_text()))

    def upload_folder(self, *, folder_path: Path, path_in_repo: str, repo_id: str, repo_type: str) -> None:
        self.asked.append(
            ("folder", repo_id, repo_type, path_in_repo, sorted(p.name for p in folder_path.iterdir()))
        )


def test_files_and_folders_go_to_their_place_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_text("A")
    (tmp_path / "a-state").mkdir()
    (tmp_path / "a-state" / "state.safetensors").touch()
    hub = Hub()
    with Uploads(hub, Repository("me/edit", "dataset", "/loras/new/", private=False)) as uploads:
        uploads.send(tmp_path / "a.safetensors")
        uploads.send(tmp_path / "a-state")
    assert hub.asked == [
        ("create", "me/edit", "dataset", False),
        ("file", "me/edit", "dataset", "loras/new/a.safetensors", "A"),
        ("folder", "me/edit", "dataset", "loras/new/a-state", ["state.safetensors"]),
    ]


def test_whoever_sends_does_not_wait_but_the_end_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = Hub()
    hub.free.clear()
    for name in "ab":
        (tmp_path / name).write_text(name)
    with Uploads(hub, Repository("me/edit")) as uploads:
        uploads.send(tmp_path / "a")
        uploads.send(tmp_path / "b")
        assert all(kind != "file" for kind, *_ in hub.asked)
        threading.Timer(0.2, hub.free.set).start()
    assert [place for kind, _, _, place, _ in hub.asked[1:]] == ["a", "b"]
    assert "Uploaded me/edit/b" in capsys.readouterr().err


def test_whoever_sends_waits_if_asked_to(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    hub = Hub()
    hub.free.clear()
    threading.Timer(0.1, hub.free.set).start()
    with Uploads(hub, Repository("me/edit"), beside=False) as uploads:
        uploads.send(tmp_path / "a")
        assert hub.asked[-1][-1] == "a"


def test_a_failure_is_a_warning_without_the_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("bad", "good"):
        (tmp_path / name).write_text(name)
    hub = Hub()
    with Uploads(hub, Repository("me/edit"), token="hf_secret") as uploads:
        for name in ("bad", "gone", "good"):
            uploads.send(tmp_path / name)
    told = capsys.readouterr().err
    assert "bad was not uploaded: 401 for *** at bad" in told and "hf_secret" not in told
    assert "gone was not uploaded: it was deleted before its turn came" in told
    assert hub.asked[-1][-1] == "good"


def test_nothing_is_asked_of_the_hub_when_nothing_is_sent() -> None:
    hub = Hub()
    with Uploads(hub, Repository("me/edit")):
        pass
    assert hub.asked == []
