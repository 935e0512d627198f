"""A transformer with new weights, in the layout of the checkpoint that it was loaded from.

Names, their prefix, the split into files and config.json stay. One tensor at a time is in memory.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kontext.checkpoints.reading import FP8_DTYPES
from kontext.checkpoints.source import Entry, Source
from kontext.checkpoints.transformer import is_diffusers
from kontext.files import atomic_folder, atomic_write
from kontext.lora.deltas import swap_halves
from kontext.lora.stream import Spec, Writer
from kontext.lora.weights import Stored, stored_tensors

Value = Callable[[str], Tensor]
"""A tensor of the transformer, whole and of any float dtype, by its BFL name."""


@dataclass(frozen=True)
class AsLoaded:
    """How a transformer is written: as `source`, in `dtype` (None: each tensor's own, bfloat16 where that is fp8)."""

    source: Source
    dtype: torch.dtype | None

    @property
    def is_folder(self) -> bool:
        """Whether it takes a folder: a folder of diffusers, or several files."""
        several = len(self.source.files) > 1
        return several or (self.source.path.is_dir() and is_diffusers(self.source))

    @property
    def bytes(self) -> int:
        """Of all tensors as they are written."""
        entries = (entry for where in self.stored().values() for entry in where.parts)
        return sum(Spec(entry.name, self._dtype(entry), entry.shape).bytes for entry in entries)

    def stored(self) -> dict[str, Stored]:
        """Where each tensor lies in the source, by BFL name, in the order in which they are written."""
        return stored_tensors(self.source)

    def write(self, path: Path, value: Value, metadata: Mapping[str, str]) -> None:
        """Write the file or folder `path`, which is complete or as it was before.

        `value` is asked once for each tensor, in the order of `stored`. Raises UserError when the disk refuses.
        """
        stored = self.stored()
        metadata = {**self.source.metadata, **metadata}
        with self._writers(path, stored, metadata) as writers:
            for name, where in stored.items():
                whole = value(name).detach()
                whole = swap_halves(whole) if where.swapped else whole
                for entry, part in zip(
                    where.parts, whole.split([e.shape[0] for e in where.parts]), strict=True
                ):
                    writers[entry.file].put(entry.name, part.to(self._dtype(entry)))

    def _dtype(self, entry: Entry) -> torch.dtype:
        assert entry.dtype is not None
        return self.dtype or (torch.bfloat16 if entry.dtype in FP8_DTYPES else entry.dtype)

    @contextmanager
    def _writers(
        self, path: Path, stored: Mapping[str, Stored], metadata: Mapping[str, str]
    ) -> Iterator[dict[Path, Writer]]:
        """A writer for each file of the source; on leaving, all that is written appears at once."""
        specs: dict[Path, list[Spec]] = {file: [] for file in self.source.files}
        for where in stored.values():
            for entry in where.parts:
                specs[entry.file].append(Spec(entry.name, self._dtype(entry), entry.shape))
        with ExitStack() as stack:
            if self.is_folder:
                folder = stack.enter_context(atomic_folder(path))
                targets = {file: folder / file.name for file in specs}
                self._write_index(folder, specs)
            else:
                targets = {self.source.files[0]: stack.enter_context(atomic_write(path))}
            yield {file: Writer(target, specs[file], metadata) for file, target in targets.items()}

    def _write_index(self, folder: Path, specs: Mapping[Path, list[Spec]]) -> None:
        """The index of several files, under the name that it had, and config.json."""
        home = self.source.files[0].parent
        if len(specs) > 1:
            indices = sorted(home.glob("*.safetensors.index.json"))
            first = self.source.files[0].name
            index = next(i for i in indices if first in json.loads(i.read_text())["weight_map"].values())
            total = sum(spec.bytes for of_file in specs.values() for spec in of_file)
            names = {spec.key: file.name for file, of_file in specs.items() for spec in of_file}
            content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
            (folder / index.name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if (home / "config.json").is_file():
            shutil.copyfile(home / "config.json", folder / "config.json")
