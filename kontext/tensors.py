"""The safetensors format, written: the same tensors and metadata always give the same bytes.

8 bytes with the header's length (little endian), a JSON header of metadata, types, shapes and offsets, padded with
spaces to a multiple of 8 bytes, then the bytes of all tensors without gaps. The package's own writer puts metadata in
another order each time, and leaves a file of an unknown name behind when it is killed.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


def pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The file, piece by piece: what comes before the tensors, then each of them; wide types first, for alignment.

    Tensors may be of any device and stride.
    """
    ordered = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    shapes = ((name, tensors[name].dtype, tensors[name].shape) for name in ordered)
    head, _ = header(shapes, dict(sorted(metadata.items())))
    yield head
    for name in ordered:
        yield raw(tensors[name])


def header(
    tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """What comes before tensors of these names, types and shapes, and the place in the file where each begins."""
    described: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    starts: dict[str, int] = {}
    end = 0
    for name, dtype, shape in tensors:
        starts[name], end = end, end + math.prod(shape) * dtype.itemsize
        offsets = [starts[name], end]
        described[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": offsets}
    text = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + start for name, start in starts.items()}


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, not copied if it lies in order on the CPU."""
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
