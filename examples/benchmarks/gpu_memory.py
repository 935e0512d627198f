"""Rows of the GPU benchmark about memory: peaks, small cards, streaming, loading."""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from bench import Bench, Line
from card import Run, budget, clear, peak, seconds, small_card
from files import config_of, used, write_base
from giants import Picture, Setup, ours, random_weights
from torch import Tensor
from train import our_optimizer, step_of

from kontext.checkpoints import load_transformer
from kontext.lora.adapter import targets
from kontext.memory import choice, estimate
from kontext.memory.estimate import CONTEXT, Trained, Work
from kontext.memory.placement import Placement
from kontext.memory.policies import Policy
from kontext.memory.weights import weights_of
from kontext.model.transformer import Transformer, TransformerConfig

CARDS = (24, 16, 12, 8)
HOST: Policy = "offloaded"
MARGIN = 0.97  # of a card's memory: torch reserves some more than tensors take


@cache
def trained(config: TransformerConfig, rank: int) -> Trained:
    """LoRAs of one rank on all linears that get one, with AdamW's two float32 numbers for each of theirs."""
    with torch.device("meta"):
        model = Transformer(config)
    adapted = [model.get_submodule(name) for name in targets(model)]
    numbers = rank * sum(module.in_features + module.out_features for module in adapted)
    return Trained(numbers, 8 * numbers, rank * len(adapted))


@dataclass(frozen=True)
class Task:
    """A picture's step, or with a rank a step of LoRA training, arranged so."""

    bench: Bench
    setup: Setup

    def run(self, placed: Transformer) -> Run:
        """Modulation is computed ahead where its weights wait on the host."""
        picture = Picture.random(self.bench.sizes, self.bench.device, self.bench.dtype)
        if not self.setup.rank:
            return torch.no_grad()(picture.step(placed))
        mods = picture.modulations(placed) if self.setup.placement.modulation else None
        forward: Callable[[], Tensor] = lambda: picture.velocity(placed, mods) - picture.reference  # noqa: E731
        return step_of(forward, our_optimizer(placed.train()))

    def model(self) -> Transformer:
        """What is streamed never lies on the device as a whole."""
        bench, config = self.bench, self.bench.sizes.config
        clear(bench.device)
        on_host = self.setup.placement.on_host(config)
        weights = random_weights(config, bench.device, bench.dtype, on_host=on_host)
        return self.setup.apply(ours(config, weights), bench.device)

    def estimated(self) -> float:
        """Gigabytes of tensors."""
        return self.stage().device / 1e9

    def stage(self) -> estimate.Stage:
        config, itemsize = self.bench.sizes.config, self.bench.dtype.itemsize
        weights, work = weights_of(config, itemsize=itemsize), Work(1, self.bench.sizes.tokens, itemsize)
        placed = weights.placed(self.setup.placement)
        if not self.setup.rank:
            return estimate.denoising(weights, placed, work, steps=1)
        policies = [self.setup.policy] * (config.double_blocks + config.single_blocks)
        return estimate.training(weights, placed, trained(config, self.setup.rank), work, policies)

    def measure(self) -> tuple[float, float | None]:
        """Seconds of a run, and the peak in gigabytes from before its weights were there."""

        def everything() -> None:
            nonlocal run
            run = self.run(self.model())
            run()

        run: Run | None = None
        most = peak(everything, self.bench.device)
        assert run is not None
        return seconds(run, self.bench.device, repeats=3, warmup=1), most


def peaks(bench: Bench) -> Iterator[Line]:
    """G9: peaks of what is promised, with the weights' way to their places."""
    rank, everything = bench.sizes.rank, Placement("max", True)
    for name, setup, aim in (
        ("picture, resident, modulation on the host", Setup(placement=Placement(0, True)), "19.5 GB"),
        ("picture, streamed", Setup(placement=everything), "3.5 GB"),
        (f"LoRA rank {rank}, streamed, keeps: whole", Setup(rank, "whole", everything), "7.5 GB"),
        (f"LoRA rank {rank}, streamed, keeps: offloaded", Setup(rank, HOST, everything), "4.5 GB"),
        (f"LoRA rank {rank}, resident, keeps: none", Setup(rank, "none", Placement(0, True)), "52 GB"),
    ):
        yield _line("G9", f"{name}, {bench.what()}", Task(bench, setup), aim)


def cards(bench: Bench) -> Iterator[Line]:
    """G9: the fastest setup for a card of each size, as the program chooses it, run within such a card's memory."""
    for gigabytes in CARDS[-1:] if bench.quick else CARDS:
        for rank in (0, bench.sizes.rank):
            setup = _chosen(bench, gigabytes, rank)
            name = f"{gigabytes} GiB card, {f'LoRA rank {rank}' if rank else 'picture'}"
            if setup is None:
                yield Line("cards", name, note="nothing is estimated to fit")
                continue
            streamed = f"blocks to swap {setup.placement.swap}, modulation {'host' if setup.placement.modulation else 'device'}"
            keeps = f", keeps: {setup.policy}" if setup.policy else ""
            with small_card(gigabytes, bench.device):
                yield _line(
                    "cards", f"{name}: {streamed}{keeps}", Task(bench, setup), f"within {gigabytes} GiB"
                )


def _line(row: str, name: str, task: Task, aim: str) -> Line:
    try:
        duration, most = task.measure()
    except torch.OutOfMemoryError as error:
        return Line(row, name, aim=aim, note=f"out of memory: {error}".splitlines()[0][:120])
    guess = task.estimated()
    off = f", {guess / most - 1:+.0%} of what is measured" if most else ""
    return Line(row, name, duration, peak=most, aim=aim, note=f"estimate {guess:.2f} GB{off}")


def _chosen(bench: Bench, gigabytes: float, rank: int) -> Setup | None:
    config, itemsize = bench.sizes.config, bench.dtype.itemsize
    weights, work = weights_of(config, itemsize=itemsize), Work(1, bench.sizes.tokens, itemsize)

    def setup_of(found: choice.Setup) -> Setup:
        return Setup(rank, found.policy if rank else None, found.placement)

    chosen = choice.choose(
        choice.setups(config, policies=choice.POLICIES if rank else ("none",)),
        peak=lambda found: Task(bench, setup_of(found)).stage().device + CONTEXT,
        time=choice.step_time(weights, work) if rank else choice.picture_time(weights, work),
        budget=int(MARGIN * budget(gigabytes)) + CONTEXT,
    )
    return setup_of(chosen.setup) if chosen.setup else None


def streaming(bench: Bench) -> Iterator[Line]:
    """G10: what streaming costs in time; the limit is the longer of computing and copying."""
    config, rank = bench.sizes.config, bench.sizes.rank
    weights = weights_of(config, itemsize=bench.dtype.itemsize)
    third = round((config.double_blocks + config.single_blocks) / 3)
    for kind, policy in (("picture", None), (f"LoRA rank {rank}", "whole")):
        resident = None
        for name, swap in (("resident", 0), ("two thirds streamed", third), ("all streamed", "max")):
            setup = Setup(rank if policy else 0, policy, Placement(swap, True))
            task = Task(bench, setup)
            try:
                duration, most = task.measure()
            except torch.OutOfMemoryError:
                yield Line("G10", f"{kind}, {name}", note="out of memory")
                continue
            resident = resident or duration
            copied = weights.placed(Placement(swap)).host * (2 if policy else 1) / bench.rates.from_host
            note = f"{duration / resident:.2f} times the resident one's; copies alone {copied:.3f} s"
            yield Line("G10", f"{kind}, {name}", duration, limit=max(resident, copied), peak=most, note=note)


def loading(bench: Bench) -> Iterator[Line]:
    """G13: a file to the device, against reading it; memory of the process beyond the pages of files."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "base.safetensors"
        write_base(file, config_of(bench.gigabytes))
        size = file.stat().st_size / 1e9
        read = min(_reading(file) for _ in range(2))
        for mode in (None, "fp8", "fp8_scaled", "int8"):
            clear(bench.device)

            def load(mode: str | None = mode) -> object:
                return load_transformer(file, device=bench.device, dtype=bench.dtype, quantization=mode)

            most = used(load)
            name = f"load {size:.2f} GB from cached pages, {mode or 'as it is'}"
            host = f"{size / most.seconds:.1f} GB/s; host memory at most {most.peak:.0f} MB, {most.kept:.0f} MB after"
            yield Line("G13", name, most.seconds, limit=read, aim="host 0.5 GB", note=host)


def _reading(file: Path) -> float:
    """Seconds to read a file into one piece of memory, again and again."""
    memory = bytearray(2**24)
    start = time.perf_counter()
    with open(file, "rb", buffering=0) as stream:
        while stream.readinto(memory):
            pass
    return time.perf_counter() - start
