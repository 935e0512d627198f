"""A LoRA training step against diffusers + peft: `python examples/benchmarks/train.py`.

Forward, loss, backward and optimizer step, with the same weights, inputs and rank, with and without gradient
checkpointing on both sides, and each side as its users run it: ours without, theirs with. The optimizer is AdamW: ours
as `kontext train` makes it, theirs as diffusers' training scripts do. "Kept" is what autograd
keeps between forward and backward, every piece of storage counted once; "peak" the most that a step allocates at
one time.

Options: --large (width 512, 2,560 tokens) instead of the small size, --rounds n, --device cuda.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from models import Inputs, transformer_pair
from paired import header, paired
from peft import LoraConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from kontext.lora.adapter import attach
from kontext.memory.recompute import recompute_blocks
from kontext.memory.remaking import remake_blocks
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
        return float(loss)

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
class Policy:
    """Whether our side and theirs recompute whole blocks."""

    name: str
    ours: bool
    theirs: bool


POLICIES = (
    Policy("no checkpointing", ours=False, theirs=False),
    Policy("checkpointing", ours=True, theirs=True),
    Policy("ours without, theirs with checkpointing", ours=False, theirs=True),
)


def measure(sizes: dict[str, int], policy: Policy, *, side: int, rounds: int, device: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    ours, theirs = transformer_pair(**sizes, dtype=dtype, device=device)
    inputs = Inputs.random(side=side, dtype=dtype, device=device)
    attach(ours, rank=RANK, alpha=RANK, seed=0)
    theirs.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    ours.train(), theirs.train()
    remake_blocks(ours)
    if policy.ours:
        recompute_blocks(ours)
    if policy.theirs:
        theirs.enable_gradient_checkpointing()
    kept = [
        kept_megabytes(lambda: inputs.ours(ours), ours),
        kept_megabytes(lambda: inputs.theirs(theirs), theirs),
    ]
    steps = [
        step_of(lambda: inputs.ours(ours), our_optimizer(ours)),
        step_of(lambda: inputs.theirs(theirs), peer_optimizer(theirs)),
    ]
    for step in steps:
        step()  # the optimizers' state is not the step's
    peaks = [peak_megabytes(step, device) for step in steps]
    result = paired(*steps, rounds=rounds)
    what = f"width {sizes['width']}, {inputs.tokens} tokens, rank {RANK}, {dtype}, {policy.name}".replace(
        "torch.", ""
    )
    print(result.row(what))
    for name, (mine, other) in {"kept": kept, "peak": peaks}.items():
        print(f"    {name}: {mine:.0f} and {other:.0f} MB ({mine / other:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    large = {"width": 512, "heads": 4, "double": 2, "single": 4}
    small = {"width": 256, "heads": 2, "double": 2, "single": 4}
    sizes, side = (large, 32) if options.large else (small, 16)
    print(header(f"LoRA step against diffusers + peft, {options.device}"))
    for policy in POLICIES:
        measure(sizes, policy, side=side, rounds=options.rounds, device=options.device)


if __name__ == "__main__":
    main()
