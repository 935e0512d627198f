"""Files that are either complete or not there: every output of the program is written here."""

import json
import os
import secrets
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kontext.errors import UserError


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on leaving, flush it to disk and rename it to `path`.

    Missing parent folders are made. When the body fails, the temporary file is removed and an older
    file at `path` is untouched. The temporary name is `.<name of path>.<more>.tmp`, so a writer that goes by the
    extension (PIL) must be told its format. A process that is killed leaves it behind.

    Raises UserError for anything the file system refuses: no permission, a full disk, a folder at `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".{_shortened(path.name)}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
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
    stem = f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}"
    temporary, old = path.with_name(f"{stem}.tmp"), path.with_name(f"{stem}.old.tmp")
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
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as temporary:
        try:
            save_file(plain, temporary, metadata=dict(metadata or {}))
            _sort_metadata(temporary)
        except SafetensorError as error:
            raise UserError(_refusal(Path(path), str(error))) from error


def _sort_metadata(path: Path) -> None:
    """Put the metadata in order: safetensors writes it from a hash map, in another order each time.

    Format: 8 bytes of header length, little endian, then the header in JSON, padded with spaces.
    """
    with open(path, "rb+") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= length, "the same content, written as compactly"
        file.seek(8)
        file.write(text.ljust(length))


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
