"""The tensors of a checkpoint by BFL's names, whatever its layout, read one at a time."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kontext.checkpoints.names import SWAPPED, bfl_tensor
from kontext.checkpoints.reading import COMPANION, SCALES
from kontext.checkpoints.source import Entry, Source
from kontext.checkpoints.transformer import is_diffusers
from kontext.lora.deltas import swap_halves
from kontext.lora.stream import read
from kontext.quant import dequantise


@dataclass(frozen=True)
class Stored:
    """Where a BFL tensor lies: its parts in the order of its rows, and the scale of each part in fp8."""

    parts: tuple[Entry, ...]
    scales: tuple[Entry | None, ...]
    swapped: bool

    def load(self, device: torch.device | str = "cpu") -> Tensor:
        """The whole tensor in float32, in memory of its own."""
        parts = [_plain(e, s, device) for e, s in zip(self.parts, self.scales, strict=True)]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return swap_halves(whole) if self.swapped else whole


def stored_tensors(source: Source) -> dict[str, Stored]:
    """{BFL tensor: where it lies}, in the order of the file."""
    diffusers = is_diffusers(source)
    found: dict[str, dict[int, str]] = defaultdict(dict)
    for key in source.keys():  # noqa: SIM118
        if not COMPANION.fullmatch(key):
            place = bfl_tensor(key) if diffusers else None
            found[place[0] if place else key][place[1].index if place else 0] = key
    return {
        name: _stored(source, [keys[i] for i in sorted(keys)], diffusers and is_swapped(name))
        for name, keys in found.items()
    }


def is_swapped(name: str) -> bool:
    """Whether the two layouts have the halves of this BFL tensor in a different order."""
    return name.rpartition(".")[0] == SWAPPED


def sibling(key: str, kind: str) -> str:
    """The name of another tensor of the same module."""
    return f"{key.rpartition('.')[0]}.{kind}"


def _stored(source: Source, keys: Sequence[str], swapped: bool) -> Stored:
    for key in keys:
        source.dtype(key)  # raises UserError for one that torch lacks
    parts = tuple(source.entry(key) for key in keys)
    return Stored(parts, tuple(_scale(source, key) for key in keys), swapped)


def _scale(source: Source, key: str) -> Entry | None:
    names = [sibling(key, kind) for kind in SCALES] if key.endswith(".weight") else []
    return next((source.entry(name) for name in names if name in source), None)


def _plain(entry: Entry, scale: Entry | None, device: torch.device | str) -> Tensor:
    values = read(entry).to(device)
    if scale is None:
        return values.float()
    grid = read(scale).to(device).float()
    rows = 1 if grid.numel() == 1 else len(values)
    return dequantise(values, grid.view(rows, -1).expand(len(values), -1), torch.float32)
