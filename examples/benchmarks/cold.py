"""Loading from a disk that has not cached the file: `python examples/benchmarks/cold.py --gigabytes 2`.

A random transformer in float32 is made in --folder (which must lie on the disk to be measured) and removed at the end.
In turn, each time with the page cache dropped, the file is read from beginning to end and nothing else, loaded as
bfloat16, the same without reading ahead, and loaded to whole numbers of 8 bits. Loading is compared with the reading
before and after it. Linux only.

Options: --gigabytes n (1), --rounds n (5), --folder path.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

from kontext.checkpoints import load_transformer
from kontext.files import save_tensors
from kontext.model.transformer import FLUX, Transformer
from kontext.quant import Mode

BLOCK = 8 * 2**20


def write_base(file: Path, gigabytes: float) -> None:
    """A transformer of FLUX's layout, width 1024, with as many blocks as make up the size."""
    blocks = max(1, round(gigabytes * 1e9 / 4 / (33 * 1024**2)))
    half = blocks // 2 + 1
    config = replace(FLUX, width=1024, heads=8, mlp_width=4096, double_blocks=half, single_blocks=half)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}
    noise = 0.02 * torch.randn(2**24)
    save_tensors(
        file, {name: noise[: shape.numel()].reshape(shape).clone() for name, shape in shapes.items()}, {}
    )


def drop(file: Path) -> None:
    """Let the system forget the file's content."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def read(file: Path) -> None:
    buffer = bytearray(BLOCK)
    with open(file, "rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


def load(file: Path, mode: Mode | None = None) -> object:
    return load_transformer(file, device="cpu", dtype=torch.bfloat16, quantization=mode)


def load_without(file: Path) -> object:
    with patch("kontext.checkpoints.reading.read_ahead"):
        return load(file)


RUNS: dict[str, Callable[[Path], object]] = {
    "loading": load,
    "loading without reading ahead": load_without,
    "loading to int8": partial(load, mode="int8"),
}


def seconds(run: Callable[[Path], object], file: Path) -> float:
    drop(file)
    start = time.perf_counter()
    run(file)
    return time.perf_counter() - start


def pair(run: Callable[[Path], object], file: Path) -> tuple[float, float]:
    """Seconds of reading alone, the mean of before and after, and of `run`."""
    before, own, after = (seconds(each, file) for each in (read, run, read))
    return (before + after) / 2, own


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        file = Path(folder) / "base.safetensors"
        write_base(file, options.gigabytes)
        size = file.stat().st_size / 1e9
        rounds = {name: [pair(run, file) for _ in range(options.rounds)] for name, run in RUNS.items()}
    print(f"\nLoading {size:.2f} GB from disk, float32 to bfloat16\n")
    print("| | GB/s | reading alone, GB/s | of the disk's rate |\n|---|---|---|---|")
    for name, pairs in rounds.items():
        alone, loading = (size / statistics.median(each) for each in zip(*pairs, strict=True))
        share = statistics.median(a / b for a, b in pairs)
        print(f"| {name} | {loading:.2f} | {alone:.2f} | {share:.2f} |")


if __name__ == "__main__":
    main()
