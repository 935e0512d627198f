"""safetensors files too large for memory: one tensor is read at a time, and written where it belongs.

The format: 8 bytes with the header's length (little endian), a JSON header of names, types, shapes and
offsets, then the bytes of all tensors without gaps.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from kontext.checkpoints.source import DTYPES, Entry

CHUNK = 1 << 24

_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Spec:
    """A tensor to be written."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read(entry: Entry) -> Tensor:
    """The tensor in memory of its own. A memory map would keep every page it has shown."""
    assert entry.dtype is not None
    buffer = bytearray(math.prod(entry.shape) * entry.dtype.itemsize)
    if not buffer:
        return torch.empty(entry.shape, dtype=entry.dtype)
    with open(entry.file, "rb") as file:
        file.seek(entry.start)
        file.readinto(buffer)
    return torch.frombuffer(buffer, dtype=entry.dtype).view(entry.shape)


class Writer:
    """Writes a file whose tensors are known beforehand, in any order. Wide types lie first, for alignment."""

    def __init__(self, file: BinaryIO, specs: Iterable[Spec], metadata: Mapping[str, str]) -> None:
        self.file = file
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
        file.write(len(text).to_bytes(8, "little") + text)
        self._data = 8 + len(text)

    def put(self, key: str, tensor: Tensor) -> None:
        spec = self._specs[key]
        assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), key
        self.file.seek(self._data + self._start[key])
        if tensor.numel():
            flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            self.file.write(memoryview(flat.numpy()))

    def copy(self, key: str, entry: Entry) -> None:
        """The bytes of a tensor as they are."""
        self.file.seek(self._data + self._start[key])
        left = self._specs[key].bytes
        with open(entry.file, "rb") as source:
            source.seek(entry.start)
            while left:
                chunk = source.read(min(CHUNK, left))
                assert chunk, "the file was found complete when it was opened"
                self.file.write(chunk)
                left -= len(chunk)
