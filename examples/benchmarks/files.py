"""Loading, quantising and merging against plain copying: `python examples/benchmarks/files.py --gigabytes 4`.

A random checkpoint in BFL's layout is made in --folder (by default the system's temporary one, which needs three times
the size free) and removed at the end. Loading runs in turn with `safetensors.load_file` and a copy of its tensors;
merging a LoRA of rank 16 into all linears of the blocks in turn with a copy of the file, both flushed to the disk.
Memory is the largest part of the process that is no file's (RssAnon, Linux), over what was there before; "beyond" is
what of it is not kept.

Options: --gigabytes n (0.25), --rounds n (3), --folder path, --rank n (16).
"""

import argparse
import gc
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kontext.allocation import give_back_memory
from kontext.checkpoints import load_transformer, open_source
from kontext.checkpoints.transformer import is_quantisable, transformer_config
from kontext.files import save_tensors
from kontext.lora.merge import plan_merge
from kontext.lora.report import read_adapters
from kontext.lora.rewrite import plan_checkpoint, write_checkpoint
from kontext.lora.stream import Spec, Writer
from kontext.model.transformer import FLUX, Transformer, TransformerConfig

STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Used:
    """What one run took: seconds, and megabytes at most and in the end."""

    seconds: float
    peak: float
    kept: float


def config_of(gigabytes: float) -> TransformerConfig:
    """FLUX's sizes, narrower below a gigabyte, with as many blocks as make up the size in bfloat16."""
    width = 3072 if gigabytes >= 1 else 1024 if gigabytes >= 0.25 else 256
    config = replace(
        FLUX, width=width, heads=width // 128, mlp_width=4 * width, double_blocks=1, single_blocks=2
    )
    while bytes_of(config) < gigabytes * 1e9:
        more = "double_blocks" if config.single_blocks > 2 * config.double_blocks else "single_blocks"
        config = replace(config, **{more: getattr(config, more) + 1})
    return config


def skeleton(config: TransformerConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


def bytes_of(config: TransformerConfig) -> int:
    """In bfloat16."""
    return 2 * sum(p.numel() for p in skeleton(config).parameters())


def write_base(file: Path, config: TransformerConfig) -> None:
    """Random weights, tensor by tensor."""
    shapes = {name: tuple(p.shape) for name, p in skeleton(config).state_dict().items()}
    writer = Writer(file, [Spec(name, torch.bfloat16, shape) for name, shape in shapes.items()], {})
    noise = torch.randn(2**22).mul_(0.02).bfloat16()
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        writer.put(name, noise.repeat(-(-size // len(noise)))[:size].view(shape))


def write_lora(file: Path, config: TransformerConfig, rank: int) -> None:
    tensors: dict[str, Tensor] = {}
    for name, module in skeleton(config).named_modules():
        if isinstance(module, nn.Linear) and is_quantisable(name, module):
            stem = "lora_unet_" + name.replace(".", "_")
            tensors[f"{stem}.lora_down.weight"] = 0.02 * torch.randn(rank, module.in_features)
            tensors[f"{stem}.lora_up.weight"] = 0.02 * torch.randn(module.out_features, rank)
            tensors[f"{stem}.alpha"] = torch.tensor(float(rank))
    save_tensors(file, {name: tensor.bfloat16() for name, tensor in tensors.items()})


def anonymous_megabytes() -> float:
    """Memory of this process that no file stands behind; 0 where the system does not tell."""
    lines = STATUS.read_text().splitlines() if STATUS.is_file() else []
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("RssAnon")), 0.0)


@contextmanager
def watching() -> Iterator[list[float]]:
    """A list that has the greatest memory so far as its only number."""
    peak, over = [anonymous_megabytes()], threading.Event()

    def watch() -> None:
        while not over.wait(0.003):
            peak[0] = max(peak[0], anonymous_megabytes())
        peak[0] = max(peak[0], anonymous_megabytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def give_back() -> None:
    gc.collect()
    give_back_memory()


def used(run: Callable[[], object]) -> Used:
    """What was freed counts neither as kept nor as what the next run finds there."""
    give_back()
    before = anonymous_megabytes()
    with watching() as peak:
        start = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - start
    give_back()
    kept = anonymous_megabytes()
    del result
    return Used(seconds, peak[0] - before, kept - before)


def flush(file: Path) -> None:
    with open(file, "rb+") as stream:
        os.fsync(stream.fileno())


def copy_file(old: Path, new: Path) -> None:
    shutil.copyfile(old, new)
    flush(new)


def merge(base: Path, lora: Path, out: Path) -> None:
    source = open_source(base, "transformer")
    adapters = read_adapters([lora], transformer_config(source))
    write_checkpoint(plan_checkpoint(source, plan_merge(adapters, [1.0])), out, metadata={})


def load_plain(file: Path) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def row(name: str, ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> str:
    """A line of the table; both run in turn, after one run of each that does not count."""
    used(theirs), used(ours)
    pairs = [(used(theirs), used(ours)) for _ in range(rounds)]
    peer, own = (statistics.median(pair[i].seconds for pair in pairs) for i in (0, 1))
    ratio = statistics.median(a.seconds / b.seconds for a, b in pairs)
    kept = statistics.median(b.kept for _, b in pairs)
    beyond = max(b.peak - b.kept for _, b in pairs)
    return f"| {name} | {own:.2f} s | {peer:.2f} s | {ratio:.2f} | {kept:.0f} MB | {beyond:.0f} MB |"


def measure(folder: Path, *, gigabytes: float, rounds: int, rank: int) -> list[str]:
    """The lines of the table, files made on the way aside."""
    base, lora, copy, out = (folder / f"{name}.safetensors" for name in ("base", "lora", "copy", "merged"))
    config = config_of(gigabytes)
    write_base(base, config)
    write_lora(lora, config, rank)
    flush(base)

    def load(mode: str | None) -> object:
        return load_transformer(base, device="cpu", dtype=torch.bfloat16, quantization=mode)

    size = f"{base.stat().st_size / 1e9:.2f} GB, width {config.width}"
    return [
        row(
            f"merge, rank {rank}, {size}",
            lambda: merge(base, lora, out),
            lambda: copy_file(base, copy),
            rounds,
        ),
        row("load, bfloat16 (shares the file's pages)", lambda: load(None), lambda: load_plain(base), rounds),
        row("load to fp8", lambda: load("fp8"), lambda: load_plain(base), rounds),
        row("load to fp8 with scales", lambda: load("fp8_scaled"), lambda: load_plain(base), rounds),
        row("load to int8", lambda: load("int8"), lambda: load_plain(base), rounds),
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        lines = measure(Path(folder), gigabytes=options.gigabytes, rounds=options.rounds, rank=options.rank)
    print(f"\nFiles against plain copies, {torch.get_num_threads()} threads\n")
    print("| | kontext | copy | times as fast | kept | beyond |\n|---|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
