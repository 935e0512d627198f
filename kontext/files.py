"""Files that are either complete or not there: every output of the program is written here."""

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from kontext.errors import UserError
from kontext.tensors import pieces


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on leaving, flush it to disk and rename it to `path`.

    Missing parent folders are made. When the body fails, the temporary file is removed and an older
    file at `path` is untouched. The temporary name is `.kontext-<name of path>.<more>.tmp`, so a writer that goes by the
    extension (PIL) must be told its format. A process that is killed leaves it behind.

    Raises UserError for anything the file system refuses: no permission, a full disk, a folder at `path`.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        if path.is_dir():
            raise UserError(f"Cannot write {path}: it is a folder. Give the name of a file.")
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(_refusal(path, error.strerror or str(error))) from error
    finally:
        _discard(temporary)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on leaving, flush its files to disk and put it in the place of `path`.

    When the body fails, the temporary folder is removed and an older folder at `path` is untouched.

    Raises UserError as `atomic_write` does, and for a file at `path`.
    """
    path = Path(path)
    temporary, old = _temporary(path), _temporary(path)
    try:
        if path.is_file():
            raise UserError(f"Cannot write {path}: it is a file. Give the name of a folder.")
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.iterdir():
            _flush(file)
        if path.is_dir():
            os.replace(path, old)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(_refusal(path, error.strerror or str(error))) from error
    finally:
        for left in (temporary, old):
            shutil.rmtree(left, ignore_errors=True)


def save_tensors(
    path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically: the same tensors and metadata always give the same bytes.

    Tensors may be of any device and stride; metadata values are strings. Raises UserError as `atomic_write` does.
    """
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        for piece in pieces(tensors, metadata or {}):
            file.write(piece)


def _temporary(path: Path) -> Path:
    """A new name beside `path`, from which it can be told whose it was when a killed process has left it behind."""
    return path.with_name(f".kontext-{_shortened(path.name)}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _shortened(name: str) -> str:
    """`name`, or as much of it as leaves room for more: file systems allow 255 bytes."""
    return name.encode()[:200].decode(errors="ignore")


def _flush(path: Path) -> None:
    """Force the file's content to disk: a rename may otherwise survive a power cut that its data does not."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _discard(path: Path) -> None:
    """Remove what is left of a failed write; a folder that refuses this has refused the write already."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return


def _refusal(path: Path, reason: str) -> str:
    kept = " The file that was there before is unchanged." if path.is_file() else ""
    return f"Cannot write {path}: {reason}.{kept}"
