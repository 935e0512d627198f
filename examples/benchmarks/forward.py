"""Forward passes against diffusers, same weights, same inputs: `python examples/benchmarks/forward.py`.

The transformer is measured twice: the velocity of all tokens on both sides, and a step of sampling as each side takes
it. Then ours computes in its last block what the target needs, and has text, reference, positions and the level's
modulation ready; diffusers computes everything in every step and drops what it does not need.

Options: --bfloat16 adds that type (diffusers is slow with it on a CPU without its instructions, where ours computes in
float32), --rounds n, --threads n.
"""

import argparse

import torch
from autoencoders import autoencoder_pair
from card import Sizes
from giants import Picture, exact, narrow, ours, random_weights, theirs
from paired import header, paired, relative_error
from torch import Tensor

from kontext.allocation import reuse_freed_memory
from kontext.model.latents import pack

CPU = torch.device("cpu")


def transformer(dtype: torch.dtype, rounds: int) -> None:
    sizes = Sizes(narrow(width=512, double=2, single=4), text=512, side=32, rank=0)
    weights, picture = random_weights(sizes.config, CPU, dtype), Picture.random(sizes, CPU, dtype)
    mine, peer = ours(sizes.config, weights), theirs(sizes.config, weights)
    step = picture.step(mine)
    right, same = exact(sizes.config, weights), picture.to(torch.float32)
    for what, run, other, true in (
        ("all tokens", picture.whole(mine), picture.peer(peer), same.peer(right)),
        ("a step of sampling", lambda: pack(step()), picture.peer_step(peer), same.peer_step(right)),
    ):
        told = errors(run(), other(), true())
        name = f"transformer, width 512, 2 + 4 blocks, {sizes.tokens} tokens, {dtype}, {what}"
        result = paired(run, other, rounds=rounds)
        print(result.row(f"{name} ({told})".replace("torch.", "")))


def errors(mine: Tensor, peer: Tensor, true: Tensor) -> str:
    """true: what diffusers computes in float32."""
    if torch.equal(peer, true):
        return f"difference {relative_error(mine, peer):.1e}"
    return f"error {relative_error(mine, true):.1e}, theirs {relative_error(peer, true):.1e}"


def autoencoder(rounds: int) -> None:
    mine, peer = autoencoder_pair(width=64)
    images = torch.rand(1, 3, 256, 256) * 2 - 1
    latents = mine.encode(images)
    z = latents / mine.config.scale + mine.config.shift
    for name, run, other in (
        ("encode", lambda: mine.encode(images), lambda: peer.encode(images)),
        ("decode", lambda: mine.decode(latents), lambda: peer.decode(z)),
    ):
        print(paired(run, other, rounds=rounds).row(f"autoencoder {name}, 256x256, width 64, float32"))


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    reuse_freed_memory()  # as every command does
    torch.set_num_threads(options.threads)
    print(header(f"Forward against diffusers, {options.threads} threads"))
    for dtype in (torch.float32, torch.bfloat16) if options.bfloat16 else (torch.float32,):
        transformer(dtype, options.rounds)
    autoencoder(options.rounds)


if __name__ == "__main__":
    main()
