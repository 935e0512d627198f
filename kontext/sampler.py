"""Samplers: plain functions of a denoiser, a start and a schedule."""

from collections.abc import Callable

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x (B, C, h, w), t (B,)) to the velocity, of x's shape."""


@torch.no_grad()
def euler(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, on_step: Callable[[int, Tensor], None] | None = None
) -> Tensor:
    """Euler's method from noise x (B, C, h, w) at sigmas[0] down to sigmas[-1].

    x += (sigma_next - sigma) * velocity. `on_step(i, x)` is called after step i, from 0. Levels are given to
    `denoise` on the CPU: a GPU need not be waited for to read them.
    """
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True)):
        t = torch.full((x.shape[0],), sigma)
        x = x + (sigma_next - sigma) * denoise(x, t)
        if on_step is not None:
            on_step(i, x)
    return x
