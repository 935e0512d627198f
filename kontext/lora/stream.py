"""safetensors files too large for memory: rows of tensors are read when they are wanted, and written where they belong.

The format: 8 bytes with the header's length (little endian), a JSON header of names, types, shapes and
offsets, then the bytes of all tensors without gaps.
"""

import errno
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from kontext.checkpoints.source import DTYPES, Entry

CHUNK = 1 << 24  # bytes copied at a time

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_NO_DIRECT_COPY = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(frozen=True)
class Spec:
    """A tensor to be written."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def row_bytes(tensor: Entry | Spec) -> int:
    """Bytes of one row; a single number is a row."""
    assert tensor.dtype is not None
    return math.prod(tensor.shape[1:]) * tensor.dtype.itemsize


def read(entry: Entry) -> Tensor:
    """The tensor in memory of its own. A memory map would keep every page it has shown."""
    assert entry.dtype is not None
    whole = torch.empty(entry.shape, dtype=entry.dtype)
    read_rows(entry, 0, whole)
    return whole


def read_rows(entry: Entry, row: int, into: Tensor) -> None:
    """Fill `into` (rows, ...), contiguous and of the tensor's type, with its rows from `row` on."""
    left = _bytes(into)
    with open(entry.file, "rb", buffering=0) as file:
        file.seek(entry.start + row * row_bytes(entry))
        while left:
            count = file.readinto(left)
            assert count, "the file was found complete when it was opened"
            left = left[count:]


class Writer:
    """Writes a file whose tensors are known beforehand, in any order and from several threads.

    Wide types lie first, for alignment.
    """

    def __init__(self, path: Path, specs: Iterable[Spec], metadata: Mapping[str, str]) -> None:
        self.path = path
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        self._specs: dict[str, Spec] = {}
        self._start: dict[str, int] = {}
        end = 0
        for spec in sorted(specs, key=lambda s: -s.dtype.itemsize):
            self._specs[spec.key] = spec
            self._start[spec.key], end = end, end + spec.bytes
            offsets = [self._start[spec.key], end]
            header[spec.key] = {"dtype": _CODES[spec.dtype], "shape": spec.shape, "data_offsets": offsets}
        text = json.dumps(header, ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(self._data + end)

    def put(self, key: str, tensor: Tensor, row: int = 0) -> None:
        """Write rows of a tensor, from `row` on."""
        spec = self._specs[key]
        assert (tensor.dtype, tuple(tensor.shape[1:])) == (spec.dtype, spec.shape[1:]), key
        assert row + (len(tensor) if tensor.ndim else 1) <= (spec.shape or (1,))[0], key
        left, place = _bytes(tensor.detach().cpu().contiguous()), self._place(key, row)
        size = len(left)
        with open(self.path, "rb+", buffering=0) as file:
            file.seek(place)
            while left:
                left = left[file.write(left) :]
            _begin_flushing(file, place, size)

    def copy(
        self, key: str, entry: Entry, *, row: int = 0, from_row: int = 0, rows: int | None = None
    ) -> None:
        """The bytes of a tensor as they are: all, or `rows` of its rows."""
        start = entry.start + from_row * row_bytes(entry)
        left = self._specs[key].bytes if rows is None else rows * row_bytes(entry)
        with open(entry.file, "rb", buffering=0) as old, open(self.path, "rb+", buffering=0) as new:
            _copy(old, start, new, self._place(key, row), left)
            _begin_flushing(new, self._place(key, row), left)

    def _place(self, key: str, row: int) -> int:
        return self._data + self._start[key] + row * row_bytes(self._specs[key])


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def _begin_flushing(file: BinaryIO, start: int, size: int) -> None:
    """Let the disk begin with what was just written, beside the work on what follows.

    On Linux this advice does so; other pages it drops, but these are not on the disk yet.
    """
    if sys.platform == "linux" and size:
        os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_DONTNEED)


def _copy(old: BinaryIO, start: int, new: BinaryIO, place: int, left: int) -> None:
    """Copy within the kernel where it can, else through memory."""
    direct = hasattr(os, "copy_file_range")
    while left:
        piece = min(CHUNK, left)
        try:
            done = os.copy_file_range(old.fileno(), new.fileno(), piece, start, place) if direct else 0
        except OSError as error:
            if error.errno not in _NO_DIRECT_COPY:
                raise
            done = 0
        if not done:
            direct = False
            old.seek(start), new.seek(place)
            done = new.write(old.read(piece))
        assert done, "the file was found complete when it was opened"
        start, place, left = start + done, place + done, left - done
