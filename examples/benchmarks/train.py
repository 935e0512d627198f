"""A LoRA training step against diffusers + peft: `python examples/benchmarks/train.py`.

Forward, loss on the target's velocity, backward and optimizer step, with the same weights, inputs and rank, with and
without gradient checkpointing on both sides, and each side as its users run it: ours without, theirs with. Each side
takes its step as its training does: ours computes in the last block what the target needs, diffusers' script all
tokens, and drops the reference's. The last block weighs more in a model of six blocks than in one of 57, so the same is
measured with the loss on all tokens. The optimizer is AdamW: ours as `kontext train` makes it, theirs as diffusers'
training scripts do. "Kept" is what autograd keeps between forward and backward, every piece of storage counted once;
"peak" the most that a step allocates at one time.

Options: --large (width 512, 2,560 tokens) instead of the small size, --rounds n, --device cuda
(then in bfloat16), --bfloat16 (on a CPU without its instructions theirs is slow, and ours computes in float32).
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from card import Sizes
from giants import Picture, Setup, Weights, exact, narrow, ours, random_weights, theirs
from paired import header, paired
from peft import LoraConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from kontext.allocation import reuse_freed_memory
from kontext.training.optimizers import make_optimizer

RANK = 16
TARGETS = (
    r".*transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    r"|ff\.net\.0\.proj|ff\.net\.2|ff_context\.net\.0\.proj|ff_context\.net\.2|proj_mlp|proj_out)"
)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def our_optimizer(model: nn.Module) -> Optimizer:
    return make_optimizer("adamw", [{"params": trainable(model), "lr": 1e-4}], arguments={})


def peer_optimizer(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(trainable(model), lr=1e-4)


def step_of(forward: Callable[[], Tensor], optimizer: Optimizer) -> Callable[[], float]:
    """One training step: mean squared velocity as the loss."""

    def step() -> float:
        loss = forward().float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def kept_megabytes(forward: Callable[[], Tensor], weights: nn.Module) -> float:
    """What autograd keeps for the backward pass, weights aside."""
    known = {t.untyped_storage().data_ptr() for t in (*weights.parameters(), *weights.buffers())}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(storages.values()) / 1e6


def peak_megabytes(step: Callable[[], object], device: str) -> float:
    """The most memory that a step holds beyond what was held before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = (event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]")
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(accumulate(changes)) / 1e6


@dataclass(frozen=True)
class Case:
    """Whether our side and theirs recompute whole blocks, and whether the loss is on all tokens."""

    name: str
    ours: bool
    theirs: bool
    whole: bool = False


CASES = (
    Case("no checkpointing", ours=False, theirs=False),
    Case("checkpointing", ours=True, theirs=True),
    Case("ours without, theirs with checkpointing", ours=False, theirs=True),
    Case("no checkpointing, loss on all tokens", ours=False, theirs=False, whole=True),
)


def measure(sizes: Sizes, case: Case, *, rounds: int, device: torch.device, dtype: torch.dtype) -> None:
    weights, picture = random_weights(sizes.config, device, dtype), Picture.random(sizes, device, dtype)
    mine, peer = ours(sizes.config, weights), theirs(sizes.config, weights)
    Setup(rank=sizes.rank, policy="whole" if case.ours else "none").apply(mine, device)
    peer.add_adapter(LoraConfig(r=sizes.rank, lora_alpha=sizes.rank, target_modules=TARGETS))
    mine.train(), peer.train()
    if case.theirs:
        peer.enable_gradient_checkpointing()
    if case.whole:
        runs = picture.whole(mine), picture.peer(peer)
    else:
        runs = (lambda: picture.velocity(mine)), picture.peer_step(peer)
    true = exact_loss(sizes, weights, picture, whole=case.whole)
    kept = [kept_megabytes(run, model) for run, model in zip(runs, (mine, peer), strict=True)]
    steps = [step_of(runs[0], our_optimizer(mine)), step_of(runs[1], peer_optimizer(peer))]
    losses = [step() for step in steps]  # also makes the optimizers' state, which is not the step's
    peaks = [peak_megabytes(step, device.type) for step in steps]
    result = paired(*steps, rounds=rounds)
    errors = [abs(loss / true - 1) for loss in losses]
    what = f"width {sizes.config.width}, {sizes.tokens} tokens, rank {sizes.rank}, {dtype}, {case.name}"
    print(
        result.row(
            f"{what} (error of the loss {errors[0]:.0e}, theirs {errors[1]:.0e})".replace("torch.", "")
        )
    )
    for name, (ours_, other) in {"kept": kept, "peak": peaks}.items():
        print(f"    {name}: {ours_:.0f} and {other:.0f} MB ({ours_ / other:.2f})")


@torch.no_grad()
def exact_loss(sizes: Sizes, weights: Weights, picture: Picture, *, whole: bool) -> float:
    """Of diffusers' model in float32: new adapters change nothing."""
    model, same = exact(sizes.config, weights), picture.to(torch.float32)
    return (same.peer(model) if whole else same.peer_step(model))().square().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bfloat16", action="store_true")
    options = parser.parse_args()
    width, side = (512, 32) if options.large else (256, 16)
    sizes = Sizes(narrow(width, double=2, single=4), text=512, side=side, rank=RANK)
    dtype = torch.bfloat16 if options.bfloat16 or options.device == "cuda" else torch.float32
    reuse_freed_memory()  # as every command does
    print(header(f"LoRA step against diffusers + peft, {options.device}, {torch.get_num_threads()} threads"))
    for case in CASES:
        measure(sizes, case, rounds=options.rounds, device=torch.device(options.device), dtype=dtype)


if __name__ == "__main__":
    main()
