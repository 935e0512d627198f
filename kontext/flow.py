"""Rectified flow: the one home of its formulas, for training, previews and generation.

t is the noise level, 0 for a picture and 1 for noise: x_t = (1 - t) x_0 + t n (Liu et al. 2022; Esser et al.
2024).
"""

import math

import torch
from torch import Tensor

# mu of the resolution-dependent shift is the line through these two points (tokens, mu), not clamped.
MU_POINTS = ((256, 0.5), (4096, 1.15))


def mix(latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t of latents (B, ...) and noise (B, ...) at levels t (B,)."""
    t = t.reshape(-1, *[1] * (latents.dim() - 1))
    return (1 - t) * latents + t * noise


def velocity(latents: Tensor, noise: Tensor) -> Tensor:
    """dx_t/dt = n - x_0, which the model learns."""
    return noise - latents


def shift(t: Tensor, s: float | Tensor) -> Tensor:
    """s t / (1 + (s - 1) t): moves levels towards noise for s > 1 (Esser et al. 2024, section 5.3.2)."""
    return s * t / (1 + (s - 1) * t)


def resolution_mu(tokens: int) -> float:
    """mu for a picture of `tokens` target tokens; references do not count."""
    (x0, y0), (x1, y1) = MU_POINTS
    return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)


def schedule(steps: int, tokens: int, *, flow_shift: float | None = None) -> Tensor:
    """Noise levels (steps + 1,) from 1 to 0, float32 on the CPU.

    Linear levels, shifted by exp(mu) of the number of target tokens, or by `flow_shift` if given.
    """
    s = math.exp(resolution_mu(tokens)) if flow_shift is None else flow_shift
    return shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64), s).float()
