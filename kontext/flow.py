"""Rectified flow: the one home of its formulas, for training, previews and generation.

t is the noise level, 0 for a picture and 1 for noise: x_t = (1 - t) x_0 + t n (Liu et al. 2022; Esser et al.
2024).
"""

import math

import torch
from torch import Tensor

# mu of the resolution-dependent shift is the line through these two points (tokens, mu), not clamped.
MU_POINTS = ((256, 0.5), (4096, 1.15))
TABLE, TABLE_MU = 10_000, 1.15
"""Entries and shift of ComfyUI's table of noise levels."""


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


def schedule(steps: int, tokens: int, *, kind: str = "flux", flow_shift: float | None = None) -> Tensor:
    """Noise levels (steps + 1,) from 1 to 0, float32 on the CPU.

    kind: "flux" is linear levels, shifted by exp(mu) of the number of target tokens. "simple" and "beta" are
    ComfyUI's, of its table of 10,000 levels shifted by exp(1.15): evenly spaced, and by quantiles of the
    Beta(0.6, 0.6) distribution, which spends more steps on both ends. `flow_shift` takes the place of exp(mu).
    """
    mu = resolution_mu(tokens) if kind == "flux" else TABLE_MU
    s = math.exp(mu) if flow_shift is None else flow_shift
    return shift(LEVELS[kind](steps), s).float()


def _linear_levels(steps: int) -> Tensor:
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def _simple_levels(steps: int) -> Tensor:
    """Every (TABLE / steps)-th entry of the table 1/TABLE, ..., 1 from its end, rounded towards the end; then 0."""
    places = [TABLE - int(i * (TABLE / steps)) for i in range(steps)]
    return torch.tensor([*places, 0], dtype=torch.float64) / TABLE


def _beta_levels(steps: int) -> Tensor:
    """The table's entries nearest to the quantiles 1, 1 - 1/steps, ..., 1/steps; then 0 (Lee et al. 2024)."""
    quantiles = beta_quantile(_linear_levels(steps)[:-1], 0.6)
    places = torch.round(quantiles * (TABLE - 1)) + 1
    return torch.cat((places, torch.zeros(1, dtype=torch.float64))) / TABLE


LEVELS = {"flux": _linear_levels, "simple": _simple_levels, "beta": _beta_levels}
"""Levels before the shift, by the schedule's name."""


def beta_quantile(p: Tensor, a: float) -> Tensor:
    """The x in 0..1 at which the cumulative distribution of Beta(a, a) is p, float64, by bisection.

    Up to x = 1/2 the distribution is x^a / (a B(a, a)) 2F1(a, 1 - a; a + 1; x); above it is symmetric.
    """
    tail = torch.minimum(p, 1 - p)
    low, high = torch.zeros_like(tail), torch.full_like(tail, 0.5)
    log_scale = math.lgamma(2 * a) - 2 * math.lgamma(a) - math.log(a)
    for _ in range(60):
        x = (low + high) / 2
        term = total = torch.ones_like(x)
        for n in range(60):  # converges like x^n, and x is at most 1/2
            term = term * x * (a + n) * (1 - a + n) / ((a + 1 + n) * (n + 1))
            total = total + term
        below = x**a * math.exp(log_scale) * total < tail
        low, high = torch.where(below, x, low), torch.where(below, high, x)
    return torch.where(p > 0.5, 1 - high, high)  # high: of the middle, 1/2 to the last digit
