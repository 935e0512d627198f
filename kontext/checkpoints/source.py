"""Tensors on disk: one safetensors file, or several under one index, read one by one.

Files are memory-mapped: a tensor on the CPU is a view of the file until it is cast or changed.
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kontext.checkpoints.recognise import EXPECTED, Kind, describe, find_prefix
from kontext.errors import UserError
from kontext.tensors import DTYPES

_USUAL_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_BEGINNINGS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights themselves: run `git lfs pull`"),
    (b"<", "a web page: the download was refused; log in to the site, accept its licence and download again"),
    (b"GGUF", "a GGUF file: download the .safetensors file of this model instead"),
    (b"PK", "a pickle, which may run any program: convert it to safetensors first"),
    (b"\x80", "a pickle, which may run any program: convert it to safetensors first"),
)


@dataclass(frozen=True)
class Entry:
    """One tensor's place: its file, its name there, its shape and dtype (None for one that torch lacks).

    start: its first byte, counted from the beginning of the file.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    start: int


class Source:
    """Tensors by name, in the order of the file. `config` is the config.json beside them, {} without one."""

    def __init__(
        self, path: Path, entries: dict[str, Entry], metadata: dict[str, str], config: dict[str, Any]
    ) -> None:
        self.path, self.metadata, self.config = path, metadata, config
        self._entries = entries
        self._open: dict[Path, Any] = {}

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(entry.file for entry in self._entries.values()))

    def keys(self) -> list[str]:
        return list(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def entry(self, key: str) -> Entry:
        """Where the tensor lies, for reading it without a memory map."""
        return self._entries[key]

    def shape(self, key: str) -> tuple[int, ...]:
        return self._entries[key].shape

    def dtype(self, key: str) -> torch.dtype:
        """Raises UserError for a number format that torch does not know."""
        dtype = self._entries[key].dtype
        if dtype is None:
            raise UserError(f"{self.path}: the tensor {key} has a number format that cannot be read.")
        return dtype

    def get(self, key: str, device: torch.device | str = "cpu") -> Tensor:
        """One tensor. On the CPU it shares the file's memory: never change it in place."""
        entry = self._entries[key]
        try:
            if entry.file not in self._open:
                self._open[entry.file] = safe_open(entry.file, framework="pt")
            return self._open[entry.file].get_tensor(entry.name).to(device)
        except SafetensorError as error:
            raise UserError(f"{entry.file}: the tensor {entry.name} cannot be read ({error}).") from error

    def below(self, prefix: str) -> "Source":
        """The tensors whose names begin with `prefix`, under the rest of their names."""
        entries = {k[len(prefix) :]: entry for k, entry in self._entries.items() if k.startswith(prefix)}
        return Source(self.path, entries, self.metadata, self.config)


def open_source(path: Path | str, kind: Kind) -> Source:
    """Open a file, a folder of a model, or a diffusers pipeline folder, and see that it holds `kind`.

    A prefix (`model.diffusion_model.`), and models beside the one asked for, are taken away.

    Raises UserError for anything that is not a complete safetensors file of that kind.
    """
    path = Path(path)
    file = _weights(path, kind)
    if file.name.endswith(".index.json"):
        source = _open_index(file)
    else:
        entries, metadata = read_header(file)
        source = Source(path, entries, metadata, _config(file))
    prefix = find_prefix(source.keys(), kind)
    if prefix is None:
        wanted = EXPECTED[kind]
        raise UserError(f"{path} is {describe(source.keys())}; {wanted.flag} expects {wanted.text}.")
    return source.below(prefix) if prefix else source


def _weights(path: Path, kind: Kind) -> Path:
    """The file to read: `path` itself, or in a folder (or the fitting subfolder) its index or only file."""
    if path.is_file():
        return path
    if not path.exists():
        raise UserError(f"{EXPECTED[kind].flag}: there is no file or folder {path}.")
    folder = next((path / name for name in EXPECTED[kind].subfolders if (path / name).is_dir()), path)
    indices = sorted(folder.glob("*.safetensors.index.json"))
    files = sorted(folder.glob("*.safetensors"))
    usual = [folder / name for name in _USUAL_NAMES if folder / name in files]
    choice = usual or indices or files
    if len(choice) == 1:
        return choice[0]
    if choice:
        names = ", ".join(file.name for file in choice)
        raise UserError(f"{folder} holds several files of weights ({names}); give {EXPECTED[kind].flag} one.")
    if any(file.suffix in _PICKLES for file in folder.iterdir()):
        raise UserError(
            f"{folder} holds pickled weights only, which may run any program: convert to safetensors."
        )
    raise UserError(f"The folder {folder} holds no .safetensors file ({EXPECTED[kind].flag}).")


def _open_index(index: Path) -> Source:
    """Open all files that an index names."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is no index of safetensors files: it has no `weight_map`.") from error
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for name in sorted(set(names.values())):
        file = index.parent / name
        if not file.is_file():
            raise UserError(
                f"{index.name} names {name}, which is missing in {index.parent}: download it too."
            )
        more, its_metadata = read_header(file)
        entries |= more
        metadata |= its_metadata
    return Source(index.parent, entries, metadata, _config(index))


def _config(file: Path) -> dict[str, Any]:
    """config.json beside the weights, where there is one that describes a model."""
    path = file.parent / "config.json"
    if file.name not in _USUAL_NAMES and not file.name.endswith(".index.json") or not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from error


def read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Names, shapes and dtypes in the order of the data, and the metadata.

    Format: 8 bytes of header length, little endian; the header in JSON; the data.
    Raises UserError for a file that is empty, truncated, or something else.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        start = stream.read(64)
        _refuse(file, size, start)
        (length,) = struct.unpack("<Q", start[:8].ljust(8, b"\0"))
        if not start[8:].lstrip().startswith(b"{") or length > 100_000_000:
            raise UserError(f"{file} is not a safetensors file.")
        if 8 + length > size:
            raise _truncated(file, size, 8 + length)
        stream.seek(8)
        raw = stream.read(length)
    entries, metadata, end = _parse(file, raw)
    if 8 + length + end > size:
        raise _truncated(file, size, 8 + length + end)
    return entries, metadata


def _parse(file: Path, raw: bytes) -> tuple[dict[str, Entry], dict[str, str], int]:
    """Entries, metadata, and where the data ends."""
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", {})
        data = 8 + len(raw)
        rows = sorted(header.items(), key=lambda row: row[1]["data_offsets"])
        entries = {
            name: Entry(
                file, name, tuple(info["shape"]), DTYPES.get(info["dtype"]), data + info["data_offsets"][0]
            )
            for name, info in rows
        }
        return entries, metadata, max((info["data_offsets"][1] for _, info in rows), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not a safetensors file: its header cannot be read.") from error


def _refuse(file: Path, size: int, start: bytes) -> None:
    """Raise UserError for what is known not to be safetensors."""
    if size == 0:
        raise UserError(f"{file} is empty: download it again.")
    for beginning, what in _BEGINNINGS:
        if start.startswith(beginning) and not start[8:9] == b"{":
            raise UserError(f"{file} is {what}.")
    if file.suffix in _PICKLES:
        raise UserError(f"{file} is a pickle, which may run any program: convert it to safetensors first.")


def _truncated(file: Path, size: int, whole: int) -> UserError:
    return UserError(
        f"{file} is truncated: it has {size:,} bytes of {whole:,}. The download broke off: repeat it."
    )
