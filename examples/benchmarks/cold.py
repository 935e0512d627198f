"""Loading from a disk that has not cached the file: `python examples/benchmarks/cold.py --gigabytes 2`.

A random transformer in float32 is made in --folder (which must lie on the disk to be measured) and removed at the end.
In turn, each time with the page cache dropped, the file is read from beginning to end and nothing else, loaded as
bfloat16, and loaded without reading ahead. Linux only.

Options: --gigabytes n (1), --rounds n (5), --folder path.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch

from kontext.checkpoints import load_transformer
from kontext.files import save_tensors
from kontext.model.transformer import Transformer, TransformerConfig

BLOCK = 8 * 2**20


def write_base(file: Path, gigabytes: float) -> None:
    """A transformer of FLUX's layout, width 1024, with as many blocks as make up the size."""
    blocks = max(1, round(gigabytes * 1e9 / 4 / (33 * 1024**2)))
    config = TransformerConfig(
        64, 64, 4096, 768, 1024, 8, 4096, blocks // 2 + 1, blocks // 2 + 1, (16, 56, 56), 1e4, True
    )
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


def load(file: Path) -> object:
    return load_transformer(file, device="cpu", dtype=torch.bfloat16)


def load_without(file: Path) -> object:
    with patch("kontext.checkpoints.reading.read_ahead"):
        return load(file)


def seconds(run: Callable[[Path], object], file: Path) -> float:
    drop(file)
    start = time.perf_counter()
    run(file)
    return time.perf_counter() - start


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
        runs = (read, load, load_without)
        rounds = [[seconds(run, file) for run in runs] for _ in range(options.rounds)]
    print(f"\nLoading {size:.2f} GB from disk, float32 to bfloat16\n")
    print("| | GB/s | of the disk's rate |\n|---|---|---|")
    for i, name in enumerate(("reading alone", "loading", "loading without reading ahead")):
        rate = size / statistics.median(each[i] for each in rounds)
        share = statistics.median(each[0] / each[i] for each in rounds)
        print(f"| {name} | {rate:.2f} | {share:.2f} |")


if __name__ == "__main__":
    main()
