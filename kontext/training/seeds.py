"""Where every random number of training comes from.

A draw depends on the run's seed and on its place in the run (epoch, batch, sample or step), and on nothing
else. So resuming, loader workers, sample images and the number of processes cannot change it.
"""

import hashlib

import torch
from torch import Generator, Tensor


def seed_of(*place: int | str) -> int:
    """A seed of 32 bits for a place, such as ("noise", 42, epoch, batch)."""
    digest = hashlib.blake2b("/".join(map(str, place)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def generator_of(*place: int | str) -> Generator:
    """A CPU generator for a place."""
    return Generator().manual_seed(seed_of(*place))


def draw_noise(shape: tuple[int, ...], *place: int | str) -> Tensor:
    """Normal noise of `shape` (B, C, h, w), float32 on the CPU, each sample from its own seed.

    A sample's noise so does not depend on how many others share its batch.
    """
    rows = [torch.randn(shape[1:], generator=generator_of("noise", *place, row)) for row in range(shape[0])]
    return torch.stack(rows)


def draw_uniform(count: int, *place: int | str) -> Tensor:
    """`count` uniform numbers, float64, each from its own seed."""
    rows = [
        torch.rand((), generator=generator_of("uniform", *place, row), dtype=torch.float64)
        for row in range(count)
    ]
    return torch.stack(rows)
