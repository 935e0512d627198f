"""Samplers: plain functions of a denoiser, a start and a schedule.

All integrate dx/dt = v(x, t) from noise x (B, C, h, w) at sigmas[0] down to sigmas[-1]. `on_step(i, x)` is called
after step i, from 0. Levels are given to `denoise` on the CPU: a GPU need not be waited for to read them.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x (B, C, h, w), t (B,)) to the velocity, of x's shape."""

OnStep = Callable[[int, Tensor], None]


@torch.no_grad()
def euler(denoise: Denoise, x: Tensor, sigmas: Tensor, *, on_step: OnStep | None = None) -> Tensor:
    """Euler's method: x += (sigma_next - sigma) * velocity."""
    for i, sigma, sigma_next in _steps(sigmas):
        x = x + (sigma_next - sigma) * denoise(x, _level(x, sigma))
        _report(on_step, i, x)
    return x


@torch.no_grad()
def heun(denoise: Denoise, x: Tensor, sigmas: Tensor, *, on_step: OnStep | None = None) -> Tensor:
    """Heun's method (Karras et al. 2022, algorithm 1): the mean of the velocities at both ends of a step.

    Second order for twice the passes. The step to level 0, which the model did not learn, is Euler's.
    """
    for i, sigma, sigma_next in _steps(sigmas):
        d = denoise(x, _level(x, sigma))
        x_next = x + (sigma_next - sigma) * d
        if sigma_next > 0:
            d = (d + denoise(x_next, _level(x, sigma_next))) / 2
            x_next = x + (sigma_next - sigma) * d
        x = x_next
        _report(on_step, i, x)
    return x


@torch.no_grad()
def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor, *, on_step: OnStep | None = None) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) for alpha = 1 - t, sigma = t: second order, one pass a step.

    With lambda = log((1 - t) / t) its update is x = (t / s) x + (1 - t / s) D, from level s to t, where D is the
    predicted picture x_0, extrapolated in lambda from this step's and the last one's. The first step, which comes
    from lambda = -inf, and the last, which goes to +inf, are of first order.
    """
    old, h_last = None, math.inf
    for i, sigma, sigma_next in _steps(sigmas):
        denoised = x - sigma * denoise(x, _level(x, sigma))
        h = _log_ratio(sigma_next) - _log_ratio(sigma)
        towards = denoised
        if old is not None and math.isfinite(h) and 0 < h_last < math.inf:
            towards = denoised + h / (2 * h_last) * (denoised - old)
        ratio = sigma_next / sigma
        x = ratio * x + (1 - ratio) * towards
        old, h_last = denoised, h
        _report(on_step, i, x)
    return x


SAMPLERS = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}
"""By the name that the user gives."""


def _steps(sigmas: Tensor) -> Iterator[tuple[int, float, float]]:
    levels = sigmas.tolist()
    return ((i, *pair) for i, pair in enumerate(zip(levels[:-1], levels[1:], strict=True)))


def _level(x: Tensor, sigma: float) -> Tensor:
    return torch.full((x.shape[0],), sigma)


def _log_ratio(t: float) -> float:
    """lambda of level t: -inf for noise, +inf for a picture."""
    if t in (0, 1):
        return math.inf if t == 0 else -math.inf
    return math.log((1 - t) / t)


def _report(on_step: OnStep | None, i: int, x: Tensor) -> None:
    if on_step is not None:
        on_step(i, x)
