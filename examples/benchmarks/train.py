"""A LoRA training step against diffusers + peft: `python examples/benchmarks/train.py`.

Forward, loss, backward and optimizer step, with the same weights, inputs and rank, with and without gradient
checkpointing on both sides. Memory is what autograd keeps between forward and backward, every piece of storage
counted once.

Options: --large (width 512, 2,560 tokens) instead of the small size, --rounds n, --device cuda.
"""

import argparse
from collections.abc import Callable, Iterable

import torch
from models import Inputs, transformer_pair
from paired import header, paired
from peft import LoraConfig
from torch import Tensor, nn

from kontext.lora.adapter import attach
from kontext.memory.recompute import recompute_blocks

RANK = 16
TARGETS = (
    r".*transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    r"|ff\.net\.0\.proj|ff\.net\.2|ff_context\.net\.0\.proj|ff_context\.net\.2|proj_mlp|proj_out)"
)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def step_of(forward: Callable[[], Tensor], parameters: Iterable[nn.Parameter]) -> Callable[[], float]:
    """One training step: mean squared velocity as the loss."""
    optimizer = torch.optim.AdamW(list(parameters), lr=1e-4)

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


def measure(sizes: dict[str, int], *, side: int, checkpointing: bool, rounds: int, device: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    ours, theirs = transformer_pair(**sizes, dtype=dtype, device=device)
    inputs = Inputs.random(side=side, dtype=dtype, device=device)
    attach(ours, rank=RANK, alpha=RANK, seed=0)
    theirs.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    ours.train(), theirs.train()
    kept = [
        kept_megabytes(lambda m=m, f=f: f(m), m) for m, f in ((ours, inputs.ours), (theirs, inputs.theirs))
    ]
    if checkpointing:
        recompute_blocks(ours)
        theirs.enable_gradient_checkpointing()
    result = paired(
        step_of(lambda: inputs.ours(ours), trainable(ours)),
        step_of(lambda: inputs.theirs(theirs), trainable(theirs)),
        rounds=rounds,
    )
    memory = "" if checkpointing else f", kept {kept[0]:.0f} and {kept[1]:.0f} MB ({kept[0] / kept[1]:.2f})"
    policy = "checkpointing" if checkpointing else "no checkpointing"
    print(result.row(f"width {sizes['width']}, {inputs.tokens} tokens, rank {RANK}, {policy}{memory}"))


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
    for checkpointing in (False, True):
        measure(sizes, side=side, checkpointing=checkpointing, rounds=options.rounds, device=options.device)


if __name__ == "__main__":
    main()
