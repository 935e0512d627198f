"""safetensors files too large for memory: rows of tensors are read when they are wanted, and written where they belong."""

import errno
import math
import os
import sys
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from kontext.checkpoints.source import Entry
from kontext.tensors import header, raw

CHUNK = 1 << 24  # bytes copied at a time
UNFLUSHED = 1 << 26  # bytes written until the disk is told to begin with them

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
    assert into.is_contiguous()  # else a copy of it would be filled
    left = raw(into)
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
        ordered = sorted(specs, key=lambda spec: -spec.dtype.itemsize)
        self._specs = {spec.key: spec for spec in ordered}
        self._unflushed, self._lock = 0, threading.Lock()
        head, self._start = header(((spec.key, spec.dtype, spec.shape) for spec in ordered), metadata)
        with open(path, "wb") as file:
            file.write(head)
            file.truncate(len(head) + sum(spec.bytes for spec in ordered))

    def put(self, key: str, tensor: Tensor, row: int = 0) -> None:
        """Write rows of a tensor, from `row` on."""
        spec = self._specs[key]
        assert (tensor.dtype, tuple(tensor.shape[1:])) == (spec.dtype, spec.shape[1:]), key
        assert row + (len(tensor) if tensor.ndim else 1) <= (spec.shape or (1,))[0], key
        left, place = raw(tensor), self._place(key, row)
        size = len(left)
        with open(self.path, "rb+", buffering=0) as file:
            file.seek(place)
            while left:
                left = left[file.write(left) :]
            self._flush(file, size)

    def copy(
        self, key: str, entry: Entry, *, row: int = 0, from_row: int = 0, rows: int | None = None
    ) -> None:
        """The bytes of a tensor as they are: all, or `rows` of its rows."""
        start = entry.start + from_row * row_bytes(entry)
        left = self._specs[key].bytes if rows is None else rows * row_bytes(entry)
        with open(entry.file, "rb", buffering=0) as old, open(self.path, "rb+", buffering=0) as new:
            _copy(old, start, new, self._place(key, row), left)
            self._flush(new, left)

    def _flush(self, file: BinaryIO, written: int) -> None:
        """Let the disk begin with what was written, beside the work on what follows.

        On Linux this advice does so, and drops the pages that are on the disk already: taking new memory for a whole
        checkpoint costs more than merging. It looks at all pages there are, so it is not given for every strip.
        """
        with self._lock:
            self._unflushed += written
            if self._unflushed < UNFLUSHED:
                return
            self._unflushed = 0
        if sys.platform == "linux":
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _place(self, key: str, row: int) -> int:
        return self._start[key] + row * row_bytes(self._specs[key])


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
