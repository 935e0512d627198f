"""Everything that is promised for a GPU, in half an hour: `python examples/benchmarks/gpu.py --out results`.

A full-size transformer with random weights is made on the card, in our class and in diffusers', which share them. Rows
run in the order of their worth, each within a time limit of its own; a row that fails is written down and the next
begins. After every line `gpu.json` and `gpu.md` in --out are complete: a run that is killed keeps what it has, and the
next one with the same --out goes on with the rows that are not done. Rows that are named are measured anew.

Needs diffusers, transformers and peft beside kontext, and 60 GB of memory on the card.

Options: --rows names (all), --out folder (.), --minutes n (30) for all rows together, --rounds n (7), --gigabytes n (8)
of the file that is loaded, --quick: tiny sizes, on the CPU too, to see that everything runs.
"""

import argparse
import json
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import FrameType

import diffusers
import gpu_encoders
import gpu_memory
import gpu_speed
import torch
from bench import Bench, Line, table
from card import Sizes, clear, measure_rates
from giants import TINY

from kontext.model.transformer import FLUX

Row = Callable[[Bench], Iterator[Line]]
JSON = "gpu.json"

ROWS: dict[str, tuple[Row, float]] = {
    "rates": (gpu_speed.rates, 1),
    "generation": (gpu_speed.generation, 6),
    "training": (gpu_speed.training, 4),
    "peaks": (gpu_memory.peaks, 4),
    "fp8": (gpu_speed.eight_bits, 3),
    "profile": (gpu_speed.profiled, 2),
    "cards": (gpu_memory.cards, 7),
    "fp8-training": (gpu_speed.eight_bit_training, 4),
    "streaming": (gpu_memory.streaming, 5),
    "encoders": (gpu_encoders.encoders, 2),
    "loading": (gpu_memory.loading, 3),
}
"""By name: what is done, and in how many minutes at most."""

ELSEWHERE = "elsewhere"
NOT_HERE = (
    Line(
        "G3",
        "time to the first picture of a cold process",
        note="needs whole checkpoints on disk: see the README",
    ),
    Line("G6 G11 G12", "against musubi-tuner", note="not installed here: its side is not measured"),
    Line("G5", "step cache", note="measured with pictures of a trained model, not with random weights"),
)


class TooLong(BaseException):
    """A row has used up its time. No Exception: compilers catch those, and go on."""


@contextmanager
def within(minutes: float) -> Iterator[None]:
    """Raises TooLong in what takes longer."""

    def stop(_: int, frame: FrameType | None) -> None:
        raise TooLong(f"stopped after {minutes:.1f} minutes")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(0.01, 60 * minutes))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Results:
    """The lines of all rows so far, by the row's name, written anew with every one of them."""

    folder: Path
    title: str
    rows: dict[str, list[Line]] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    minutes: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, title: str) -> "Results":
        """Those in the folder, or none. Raises ValueError where they are of another card, other versions or sizes."""
        results = cls(folder, title)
        if not (folder / JSON).is_file():
            return results
        found = json.loads((folder / JSON).read_text(encoding="utf-8"))
        if found["title"] != title:
            raise ValueError(f"{folder / JSON} is of {found['title']}, and this is {title}")
        results.faults, results.minutes = found["faults"], found["minutes"]
        names = {each.name for each in fields(Line)}
        for line in found["lines"]:
            own = Line(**{name: value for name, value in line.items() if name in names})
            results.rows.setdefault(line["part"], []).append(own)
        return results

    @property
    def lines(self) -> list[Line]:
        return [line for lines in self.rows.values() for line in lines]

    def done(self, name: str) -> bool:
        """Whether a row has been measured to its end."""
        return name in self.minutes and name not in self.faults

    def begin(self, name: str) -> None:
        """Forget what was measured of a row, which comes last now."""
        for known in (self.rows, self.faults, self.minutes):
            known.pop(name, None)

    def add(self, name: str, line: Line) -> None:
        self.rows.setdefault(name, []).append(line)
        print(table([line]).splitlines()[-1], flush=True)
        self.write()

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [
            {"part": name, **asdict(line), "of_limit": line.of_limit}
            for name, lines in self.rows.items()
            for line in lines
        ]
        content = {"title": self.title, "lines": lines, "faults": self.faults, "minutes": self.minutes}
        faults = "".join(f"\n\n{name}: {fault.splitlines()[-1]}" for name, fault in self.faults.items())
        self._replace(JSON, json.dumps(content, indent=1))
        self._replace("gpu.md", f"{self.title}\n\n{table(self.lines)}{faults}\n")

    def _replace(self, name: str, text: str) -> None:
        new = self.folder / f"{name}.new"
        new.write_text(text, encoding="utf-8")
        new.replace(self.folder / name)


def run_row(name: str, bench: Bench, results: Results, minutes: float) -> None:
    """One row; whatever goes wrong in it is written down."""
    row, limit = ROWS[name]
    start = time.monotonic()
    results.begin(name)
    try:
        with within(min(limit, minutes)):
            for line in row(bench):
                results.add(name, line)
    except (Exception, TooLong):
        results.faults[name] = traceback.format_exc()
        print(f"{name} failed:\n{results.faults[name]}", flush=True)
    results.minutes[name] = (time.monotonic() - start) / 60
    results.write()
    clear(bench.device)


def bench_of(options: argparse.Namespace) -> Bench:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    quick = options.quick
    sizes = Sizes(TINY, text=16, side=4, rank=4) if quick else Sizes(FLUX, text=512, side=64, rank=32)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Bench(
        device=device,
        dtype=dtype,
        sizes=sizes,
        small=replace(sizes, side=sizes.side // 2),
        rates=measure_rates(sizes, device, dtype),
        rounds=1 if quick else options.rounds,
        steps=3 if quick else 150,
        compiled=device.type == "cuda",
        gigabytes=0.01 if quick else options.gigabytes,
    )


def title_of(bench: Bench) -> str:
    name = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "CPU"
    return (
        f"{name}, torch {torch.__version__}, diffusers {diffusers.__version__}, width {bench.sizes.config.width}, "
        f"{bench.sizes.config.double_blocks} + {bench.sizes.config.single_blocks} blocks, {bench.what()}"
    )


def main(arguments: list[str] | None = None) -> Results:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, "all"], default=["all"])
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    if not (options.quick or torch.cuda.is_available()):
        parser.error("there is no GPU: --quick runs at tiny sizes on the CPU")
    deadline = time.monotonic() + 60 * options.minutes
    bench = bench_of(options)
    try:
        results = Results.of(options.out, title_of(bench))
    except ValueError as error:
        parser.error(f"{error}: give another --out")
    whole = "all" in options.rows
    for name in [name for name in ROWS if not results.done(name)] if whole else options.rows:
        left = (deadline - time.monotonic()) / 60
        if left < 0.1:
            results.faults.setdefault(name, "no time was left")
            continue
        run_row(name, bench, results, left)
    results.begin(ELSEWHERE)
    for line in NOT_HERE:
        results.add(ELSEWHERE, line)
    return results


if __name__ == "__main__":
    main()
