"""Files of a run on the Hugging Face hub: sent by a thread while training goes on."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Thread
from types import TracebackType
from typing import TYPE_CHECKING

from kontext import console
from kontext.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class Repository:
    """A repository, made if there is none, and the folder in it where files go."""

    name: str
    kind: str = "model"
    folder: str = ""
    private: bool = True


class Uploads:
    """Enter it before the first file; on leaving, everything is uploaded or told to have failed.

    No failure ends a run: each is a warning, without the token. beside: whoever sends does not wait.
    """

    def __init__(
        self, api: "HfApi", repository: Repository, *, token: str | None = None, beside: bool = True
    ) -> None:
        self._api = api
        self._repository = repository
        self._token = token
        self._beside = beside
        self._waiting: Queue[Path | None] = Queue()
        self._thread = Thread(target=self._work, name="uploads", daemon=True)

    def __enter__(self) -> "Uploads":
        return self

    def send(self, path: Path) -> None:
        """Uploads a file or a folder under its name: in a while, or before this returns."""
        if not self._thread.is_alive():
            self._thread.start()
        self._waiting.put(path)
        if not self._beside:
            self._waiting.join()

    def _work(self) -> None:
        name, kind, private = self._repository.name, self._repository.kind, self._repository.private
        self._guarded(
            f"The repository {name} cannot be made",
            lambda: self._api.create_repo(name, repo_type=kind, private=private, exist_ok=True),
        )
        while (path := self._waiting.get()) is not None:
            self._guarded(f"{path} was not uploaded", lambda path=path: self._upload(path))
            self._waiting.task_done()

    def _upload(self, path: Path) -> None:
        place = "/".join(part for part in (self._repository.folder.strip("/"), path.name) if part)
        where = {
            "repo_id": self._repository.name,
            "repo_type": self._repository.kind,
            "path_in_repo": place,
        }
        if not path.exists():
            raise UserError("it was deleted before its turn came")
        if path.is_dir():
            self._api.upload_folder(folder_path=path, **where)
        else:
            self._api.upload_file(path_or_fileobj=path, **where)
        console.say(f"Uploaded {self._repository.name}/{place}")

    def _guarded(self, what: str, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # whatever the network, the hub and its package may raise
            reason = " ".join(str(error).split())
            console.warn(f"{what}: {reason.replace(self._token, '***') if self._token else reason}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._thread.is_alive():
            return
        if waiting := self._waiting.qsize():
            console.say(f"Waiting for {waiting} uploads.")
        self._waiting.put(None)
        self._thread.join()
