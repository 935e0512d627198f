"""Names of the files that a run writes, as musubi-tuner and sd-scripts name them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ADAPTER = ".safetensors"
STATE = "-state"


@dataclass(frozen=True)
class Names:
    """`<folder>/<stem>` with an epoch (counted from 1) or a step behind it, as an adapter file or a state folder."""

    folder: Path
    stem: str

    def final(self, ending: str = ADAPTER) -> Path:
        return self.folder / f"{self.stem}{ending}"

    def at_epoch(self, epoch: int, ending: str = ADAPTER) -> Path:
        return self.folder / f"{self.stem}-{epoch:06d}{ending}"

    def at_step(self, step: int, ending: str = ADAPTER) -> Path:
        return self.folder / f"{self.stem}-step{step:08d}{ending}"

    def best(self) -> Path:
        """The adapter with the lowest validation loss."""
        return self.final("-best" + ADAPTER)

    def epochs(self, ending: str = ADAPTER) -> dict[int, Path]:
        """What has been written at epochs, by epoch."""
        return self._numbered(r"-(\d{6,})", ending)

    def steps(self, ending: str = ADAPTER) -> dict[int, Path]:
        """What has been written at steps, by step."""
        return self._numbered(r"-step(\d{8,})", ending)

    def states(self) -> Iterator[Path]:
        """All state folders of the run, complete or not."""
        pattern = re.compile(re.escape(self.stem) + r"(-\d{6,}|-step\d{8,})?" + STATE)
        return (path for path in self._listing() if pattern.fullmatch(path.name))

    def unfinished(self) -> list[Path]:
        """What killed runs of this name have left of files they were writing."""
        pattern = re.compile(
            r"\."
            + re.escape(self.stem)
            + r"(-\d{6,}|-step\d{8,}|-best)?(-ema)?\.(safetensors|html|history)\..*tmp"
        )
        own = [path for path in self._listing() if pattern.fullmatch(path.name)]
        return own + [path for state in self.states() if state.is_dir() for path in state.glob(".*.tmp")]

    def _numbered(self, pattern: str, ending: str) -> dict[int, Path]:
        full = re.compile(re.escape(self.stem) + pattern + re.escape(ending))
        found = ((full.fullmatch(path.name), path) for path in self._listing())
        return {int(match[1]): path for match, path in found if match}

    def _listing(self) -> list[Path]:
        return sorted(self.folder.iterdir()) if self.folder.is_dir() else []
