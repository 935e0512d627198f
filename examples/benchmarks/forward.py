"""Forward passes against diffusers, same weights, same inputs: `python examples/benchmarks/forward.py`.

Options: --bfloat16 adds that type (slow on a CPU without its instructions), --rounds n.
"""

import argparse

import torch
from models import Inputs, autoencoder_pair, transformer_pair
from paired import header, paired, relative_error


def transformer(dtype: torch.dtype, rounds: int) -> None:
    ours, theirs = transformer_pair(width=512, heads=4, double=2, single=4, dtype=dtype)
    inputs = Inputs.random(side=32, dtype=dtype)
    error = relative_error(inputs.ours(ours), inputs.theirs(theirs))
    result = paired(lambda: inputs.ours(ours), lambda: inputs.theirs(theirs), rounds=rounds)
    name = f"transformer, width 512, 2 + 4 blocks, {inputs.tokens} tokens, {dtype}".replace("torch.", "")
    print(result.row(f"{name} (difference {error:.1e})"))


def autoencoder(rounds: int) -> None:
    ours, theirs = autoencoder_pair(width=64)
    images = torch.rand(1, 3, 256, 256) * 2 - 1
    latents = ours.encode(images)
    z = latents / ours.config.scale + ours.config.shift
    for name, run, peer in (
        ("encode", lambda: ours.encode(images), lambda: theirs.encode(images)),
        ("decode", lambda: ours.decode(latents), lambda: theirs.decode(z)),
    ):
        print(paired(run, peer, rounds=rounds).row(f"autoencoder {name}, 256x256, width 64, float32"))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    print(header(f"Forward against diffusers, {torch.get_num_threads()} threads"))
    for dtype in (torch.float32, torch.bfloat16) if options.bfloat16 else (torch.float32,):
        transformer(dtype, options.rounds)
    autoencoder(options.rounds)


if __name__ == "__main__":
    main()
