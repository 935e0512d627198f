"""Rows of the GPU benchmark about time: generation, LoRA training, 8 bits, the profiler."""

import time
from collections.abc import Callable, Iterator
from itertools import islice

import torch
from bench import Bench, Line
from card import Run, Sizes, clear, fits, peak, seconds
from diffusers import FluxTransformer2DModel
from giants import Picture, Setup, Weights, ours, rounded, theirs
from paired import Paired, paired, relative_error
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile
from train import TARGETS, our_optimizer, peer_optimizer, step_of, trainable

from kontext.compiling import compile_blocks
from kontext.errors import UserError
from kontext.memory.choice import operations
from kontext.memory.estimate import Work
from kontext.memory.policies import Policy
from kontext.model.latents import pack
from kontext.model.transformer import Transformer

POLICIES: tuple[Policy, ...] = ("none", "selective", "whole")


def rates(bench: Bench) -> Iterator[Line]:
    """What the card reaches: the limits of all other rows follow from it."""
    for name, rate in bench.rates.named().items():
        unit = "GB/s" if name in ("from_host", "copy") else "TF/s"
        scale = 1e9 if unit == "GB/s" else 1e12
        note = "" if rate else "not supported"
        yield Line("rates", name, rate and rate / scale, unit, note=note)


@torch.no_grad()
def generation(bench: Bench) -> Iterator[Line]:
    """G1, G2: a step of sampling, modulation prepared ahead, against diffusers' transformer, eager and compiled."""
    weights, picture = bench.weights(), Picture.random(bench.sizes, bench.device, bench.dtype)
    mine, other = ours(bench.sizes.config, weights), theirs(bench.sizes.config, weights)
    step, peer = picture.step(mine), picture.peer_step(other)
    error = relative_error(pack(step()), peer())
    limit = bench.rates.forward_seconds(bench.sizes)
    eager = paired(step, peer, rounds=bench.rounds)
    most = peak(step, bench.device)
    note = f"outputs differ by {error:.1e}; peak with both models' shared weights"
    yield compared(
        "G1 G2",
        f"step, {bench.what()}, eager, against diffusers eager",
        eager,
        limit,
        "of limit 1.2, 1.35 times",
        most,
        note,
    )
    if not bench.compiled:
        yield Line("G2", "step, compiled", note="not compiled on this device")
        return
    yield from _compiled(bench, mine, other, step, peer, limit)


def _compiled(
    bench: Bench, mine: Transformer, other: FluxTransformer2DModel, step: Run, peer: Run, limit: float
) -> Iterator[Line]:
    before = seconds(peer, bench.device, repeats=3)
    other.compile_repeated_blocks(fullgraph=True)
    cold = _once(peer)
    yield Line("G2", "first step of diffusers after compile_repeated_blocks", cold, limit=before)
    against = paired(step, peer, rounds=bench.rounds)
    yield compared("G2", "step, eager, against diffusers compiled", against, limit, "1.0 times")
    plain = step()
    compile_blocks(mine, bench.device)
    first = _once(step)
    note = f"its output differs from the eager one by {relative_error(step(), plain):.1e}"
    yield Line("G2", "our first step after compiling every class of block", first, note=note)
    both = paired(step, peer, rounds=bench.rounds)
    yield compared("G2", "step, compiled, against diffusers compiled", both, limit, "1.0 times")


def training(bench: Bench) -> Iterator[Line]:
    """G6, G7: a LoRA step, by what blocks keep, against diffusers + peft with gradient checkpointing."""
    weights = bench.weights()
    limit = bench.rates.training_seconds(bench.sizes)
    peer_step, dtype = _peer_step(bench, weights)
    for policy in POLICIES:
        step = _step(bench, weights, bench.sizes, Setup(bench.sizes.rank, policy))
        name = f"LoRA step, rank {bench.sizes.rank}, {bench.what()}, keeps: {policy}"
        if not fits(step, bench.device):
            yield Line("G6 G7", name, limit=limit, note="does not fit")
            continue
        result = paired(step, peer_step, rounds=bench.few)
        most = peak(step, bench.device)
        note = f"peer: peft, {dtype} adapter, gradient checkpointing; AdamW on both sides"
        yield compared("G6 G7", name, result, limit, "1.7 times; none: 1.3 of limit", most, note)
        del step
    most = peak(peer_step, bench.device)
    yield Line("G6", "peak of diffusers + peft with gradient checkpointing", most, "GB")


def _step(bench: Bench, weights: Weights, sizes: Sizes, setup: Setup, mode: str | None = None) -> Run:
    """A step of training on one picture, towards its reference."""
    clear(bench.device)
    model = ours(sizes.config, weights)
    model = setup.apply(rounded(model, mode) if mode else model, bench.device).train()
    picture = Picture.random(sizes, bench.device, bench.dtype)
    return step_of(lambda: picture.velocity(model) - picture.reference, our_optimizer(model))


def _peer_step(bench: Bench, weights: Weights) -> tuple[Run, str]:
    model, rank = theirs(bench.sizes.config, weights), bench.sizes.rank
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))
    model.train().enable_gradient_checkpointing()
    picture = Picture.random(bench.sizes, bench.device, bench.dtype)
    dtype = str(trainable(model)[0].dtype).removeprefix("torch.")
    forward, target = picture.peer_step(model), pack(picture.reference)
    return step_of(lambda: forward() - target, peer_optimizer(model)), dtype


@torch.no_grad()
def eight_bits(bench: Bench) -> Iterator[Line]:
    """G4: a step with fp8 products, and with weights in few bits made plain, against our own in full precision."""
    weights, picture = bench.weights(), Picture.random(bench.sizes, bench.device, bench.dtype)
    full = picture.step(ours(bench.sizes.config, weights))
    reference, rate = full(), bench.rates.gemm8_cast or bench.rates.gemm
    linear, attention = operations(bench.sizes.config, Work(1, bench.sizes.tokens, 2))
    limit = linear / rate + attention / bench.rates.attention
    for mode, aim in (("fp8_fast", "1.2 times"), ("int8_fast", ""), ("fp8_scaled", ""), ("nf4", "")):
        clear(bench.device)
        name = f"step, {mode}, {bench.what()}, against our own in full"
        try:
            step = picture.step(rounded(ours(bench.sizes.config, weights), mode))
            result = paired(step, full, rounds=bench.rounds)
        except (RuntimeError, ValueError, UserError) as error:
            yield Line("G4", name, note=f"failed: {error}".splitlines()[0])
            continue
        note = f"differs from the full one by {relative_error(step(), reference):.1e}"
        yield compared("G4", name, result, limit if mode == "fp8_fast" else None, aim, note=note)
        del step


def eight_bit_training(bench: Bench) -> Iterator[Line]:
    """G8: a LoRA step with fp8 products, and whether it learns as well: losses over many steps on one picture."""
    weights = bench.weights()
    setups = {policy: Setup(bench.sizes.rank, policy) for policy in ("none", "whole")}
    for policy, setup in setups.items():
        plain, fast = (_step(bench, weights, bench.sizes, setup, mode) for mode in (None, "fp8_fast"))
        if not (fits(plain, bench.device) and fits(fast, bench.device)):
            yield Line("G8", f"LoRA step, fp8_fast, keeps: {policy}", note="does not fit beside the other")
            continue
        result = paired(fast, plain, rounds=bench.few)
        name = f"LoRA step, fp8_fast, {bench.what()}, keeps: {policy}, against our own in full"
        yield compared("G8", name, result, None, "1.2 times")
    losses = {mode: _losses(bench, weights, setups["whole"], mode) for mode in (None, "fp8_fast")}
    first, last = losses[None][0], sum(losses[None][-10:]) / len(losses[None][-10:])
    fast = sum(losses["fp8_fast"][-10:]) / len(losses["fp8_fast"][-10:])
    note = f"from {first:.4f}; the loss in full precision takes the peer's place"
    name = f"mean loss of the last 10 of {bench.steps} steps, fp8_fast, {bench.what(bench.small)}"
    yield Line("G8", name, fast, "", last, last / fast, aim="1.0", note=note)


def _losses(bench: Bench, weights: Weights, setup: Setup, mode: str | None) -> list[float]:
    step = _step(bench, weights, bench.small, setup, mode)
    return [step() for _ in range(bench.steps)]


def profiled(bench: Bench) -> Iterator[Line]:
    """Where time goes: the kernels that take most of a step of sampling, and of one of training."""
    weights, picture = bench.weights(), Picture.random(bench.sizes, bench.device, bench.dtype)
    with torch.no_grad():
        yield from _kernels("step of sampling", picture.step(ours(bench.sizes.config, weights)), bench)
    step = _step(bench, weights, bench.sizes, Setup(bench.sizes.rank, "selective"))
    yield from _kernels("LoRA step, selective", step, bench)


def _kernels(name: str, run: Run, bench: Bench) -> Iterator[Line]:
    run()
    activity = ProfilerActivity.CPU if bench.quick else ProfilerActivity.CUDA
    with profile(activities=[activity]) as found:
        run()
    of: Callable[[object], float] = lambda e: (
        e.self_cpu_time_total if bench.quick else e.self_device_time_total
    )  # noqa: E731
    events = sorted(found.key_averages(), key=of, reverse=True)
    whole = sum(map(of, events)) or 1.0
    for event in islice(events, 16):
        share = f"{of(event) / whole:.1%}, {event.count} calls"
        yield Line("profile", f"{name}: {event.key[:90]}", of(event) / 1e6, note=share)


def _once(run: Run) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compared(
    row: str,
    what: str,
    result: Paired,
    limit: float | None,
    aim: str,
    most: float | None = None,
    note: str = "",
) -> Line:
    """A line of two ways that ran in turn; the times are medians, the ratio is that of pairs."""
    mine, other = (sorted(times)[len(times) // 2] for times in (result.ours, result.theirs))
    return Line(row, what, mine, "s", other, result.ratio, limit, aim, most, note)
