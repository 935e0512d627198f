"""What rows of the GPU benchmark share: where they run, and the lines that they give."""

from dataclasses import dataclass

import torch
from card import Rates, Sizes, clear
from giants import Weights, random_weights


@dataclass(frozen=True)
class Bench:
    """Where and what to measure.

    sizes: a megapixel with a reference; small: a quarter of that; steps: of the training whose losses are compared;
    compiled: whether torch.compile is measured too; gigabytes: of the file that is loaded.
    """

    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    small: Sizes
    rates: Rates
    rounds: int
    steps: int
    compiled: bool
    gigabytes: float

    @property
    def quick(self) -> bool:
        """Whether numbers mean nothing: not on a GPU."""
        return self.device.type != "cuda"

    @property
    def few(self) -> int:
        """Rounds of what takes long."""
        return 1 if self.quick else max(3, self.rounds // 2)

    def weights(self) -> Weights:
        clear(self.device)
        return random_weights(self.sizes.config, self.device, self.dtype)

    def what(self, sizes: Sizes | None = None) -> str:
        return f"{(sizes or self.sizes).tokens} tokens, {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Line:
    """One result. ours, peer, limit in `unit`: smaller is better for s and GB; better: how many times, over the peer's.

    limit: what the card's measured rates allow; aim: what was promised, in words.
    """

    row: str
    what: str
    ours: float | None = None
    unit: str = "s"
    peer: float | None = None
    better: float | None = None
    limit: float | None = None
    aim: str = ""
    peak: float | None = None
    note: str = ""

    @property
    def of_limit(self) -> float | None:
        return self.ours / self.limit if self.ours and self.limit else None

    def cells(self) -> list[str]:
        return [
            self.row,
            self.what,
            _number(self.ours, self.unit),
            _number(self.peer, self.unit),
            _number(self.better),
            _number(self.limit, self.unit),
            _number(self.of_limit),
            self.aim,
            _number(self.peak, "GB"),
            self.note,
        ]


HEADER = ["row", "what", "ours", "peer", "times as good", "limit", "of limit", "aim", "peak", "note"]


def table(lines: list[Line]) -> str:
    rows = [HEADER, ["---"] * len(HEADER), *(line.cells() for line in lines)]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows)


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return ""
    return f"{value:.4g} {unit}".strip()
