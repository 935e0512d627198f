"""Names of the files that a run writes, as musubi-tuner and sd-scripts name them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ADAPTER = ".safetensors"
AVERAGE = "-ema"
STATE = "-state"
SAMPLES = "sample"


@dataclass(frozen=True)
class Names:
    """`<folder>/<stem>` with an epoch (counted from 1) or a step behind it, and an ending.

    weights: the ending of what is trained, which is that of a file, or empty for a folder. It counts where no other
    is given.
    """

    folder: Path
    stem: str
    weights: str = ADAPTER

    def final(self, ending: str | None = None) -> Path:
        return self._named("", ending)

    def at_epoch(self, epoch: int, ending: str | None = None) -> Path:
        return self._named(f"-{epoch:06d}", ending)

    def at_step(self, step: int, ending: str | None = None) -> Path:
        return self._named(f"-step{step:08d}", ending)

    def _named(self, place: str, ending: str | None) -> Path:
        return self.folder / f"{self.stem}{place}{self.weights if ending is None else ending}"

    def best(self) -> Path:
        """The weights with the lowest validation loss."""
        return self.final("-best" + self.weights)

    @property
    def samples(self) -> Path:
        """The folder of the sample pictures, of runs of all names."""
        return self.folder / SAMPLES

    def epochs(self, ending: str) -> dict[int, Path]:
        """What has been written at epochs, by epoch."""
        return self._numbered(r"-(\d{6,})", ending)

    def steps(self, ending: str) -> dict[int, Path]:
        """What has been written at steps, by step."""
        return self._numbered(r"-step(\d{8,})", ending)

    def states(self) -> Iterator[Path]:
        """All state folders of the run, complete or not."""
        pattern = re.compile(re.escape(self.stem) + r"(-\d{6,}|-step\d{8,})?" + STATE)
        return (path for path in self._listing() if pattern.fullmatch(path.name))

    def unfinished(self) -> list[Path]:
        """What killed runs of this name have left of files they were writing."""
        pattern = re.compile(
            r"\.kontext-"
            + re.escape(self.stem)
            + r"(-\d{6,}|-step\d{8,}|-best)?(-ema)?(\.safetensors|\.html|\.history\.jsonl)?\.\d+-[0-9a-f]+\.tmp"
        )
        own = [path for path in self._listing() if pattern.fullmatch(path.name)]
        states = [path for state in self.states() if state.is_dir() for path in state.glob(".kontext-*.tmp")]
        mark = re.compile(r"\.kontext-" + re.escape(self.stem) + r"_(e?\d{6,}_.*)\.tmp")
        return (
            own + states + [path for path in self.samples.glob(".kontext-*.tmp") if mark.fullmatch(path.name)]
        )

    def _numbered(self, pattern: str, ending: str) -> dict[int, Path]:
        full = re.compile(re.escape(self.stem) + pattern + re.escape(ending))
        found = ((full.fullmatch(path.name), path) for path in self._listing())
        return {int(match[1]): path for match, path in found if match}

    def _listing(self) -> list[Path]:
        return sorted(self.folder.iterdir()) if self.folder.is_dir() else []
