"""Which noise levels t in 0..1 training sees, and how much each counts.

Every way of sampling is an increasing map from a uniform number u to a level (a quantile function). That makes
stratified draws and exact cuts to a range a matter of choosing u. Formulas: Esser et al. 2024 (logit-normal,
mode, sigma_sqrt, cosmap), Black Forest Labs (shift by resolution).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Generator, Tensor

from kontext.errors import UserError
from kontext.flow import resolution_mu, shift

Quantile = Callable[[Tensor], Tensor]
"""u in 0..1, float64, to levels of the same shape, increasing."""

EPSILON = 1e-7  # u keeps this far from 0 and 1, where a normal quantile is infinite
SMALLEST_WEIGHTED = 1e-3  # below this level sigma_sqrt, which grows as 1/t^2, is held constant
BISECTIONS = 60
# qinglong_flux: share of each part, and the log signal-to-noise of its low-noise tail
QINGLONG_SHARES = (0.79, 0.11, 0.10)
QINGLONG_TAIL = (5.36, 1.0)


@dataclass(frozen=True)
class Timesteps:
    """How levels are sampled. Names follow musubi-tuner's options; `minimum` and `maximum` are levels in 0..1."""

    sampling: str = "flux_shift"
    sigmoid_scale: float = 1.0
    flow_shift: float = 1.0
    weighting: str = "none"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    minimum: float = 0.0
    maximum: float = 1.0
    preserve_shape: bool = False


@dataclass(frozen=True)
class Part:
    """A share of the samples: `weight` of them are quantile(u), for u between `low` and `high`."""

    weight: float
    quantile: Quantile
    low: float = 0.0
    high: float = 1.0


def logit_normal(mean: float, std: float, *, s: float = 1.0) -> Quantile:
    """Levels whose logit is normal, then shifted by s."""
    return lambda u: shift(torch.sigmoid(mean + std * torch.special.ndtri(u)), s)


def log_snr(mean: float, std: float) -> Quantile:
    """Levels sigmoid(-x / 2) where x, the logarithm of the signal-to-noise ratio, is normal."""
    return logit_normal(-mean / 2, std / 2)


def mode(scale: float, *, s: float = 1.0) -> Quantile:
    """Levels crowded around one half for scale > 0, around the ends for scale < 0; then shifted by s."""
    return lambda u: shift(u + scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u), s)


def _sigma(settings: Timesteps) -> Quantile:
    # A positive logit_mean means less noise here, as in every trainer that has this mode.
    s = settings.flow_shift
    if settings.weighting == "logit_normal":
        return logit_normal(-settings.logit_mean, settings.logit_std, s=s)
    if settings.weighting == "mode":
        return mode(settings.mode_scale, s=s)
    return lambda u: shift(u, s)


def parts_of(settings: Timesteps, tokens: int) -> list[Part]:
    """The distribution of levels for pictures of `tokens` target tokens, before any limit of its range."""
    by_resolution = logit_normal(0, settings.sigmoid_scale, s=math.exp(resolution_mu(tokens)))
    snr = log_snr(settings.logit_mean, settings.logit_std)
    mixtures: dict[str, list[Quantile]] = {
        "sigma": [_sigma(settings)],
        "uniform": [lambda u: u],
        "sigmoid": [logit_normal(0, settings.sigmoid_scale)],
        "shift": [logit_normal(0, settings.sigmoid_scale, s=settings.flow_shift)],
        "flux_shift": [by_resolution],
        "logsnr": [snr],
        "qinglong_flux": [by_resolution, snr, log_snr(*QINGLONG_TAIL)],
    }
    quantiles = mixtures[settings.sampling]
    shares = QINGLONG_SHARES if len(quantiles) > 1 else (1.0,)
    return [Part(share, quantile) for share, quantile in zip(shares, quantiles, strict=True)]


def position(quantile: Quantile, t: float) -> float:
    """The u at which quantile(u) = t, by bisection; 0 or 1 where t is out of reach."""
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        below = quantile(torch.tensor(middle, dtype=torch.float64)).item() < t
        low, high = (middle, high) if below else (low, middle)
    return (low + high) / 2


def truncate(parts: Sequence[Part], minimum: float, maximum: float) -> list[Part]:
    """The same density within minimum..maximum, and nothing outside.

    Raises UserError if (next to) nothing of the distribution lies in that range.
    """
    kept = []
    for part in parts:
        low = position(part.quantile, minimum) if minimum > 0 else 0.0
        high = position(part.quantile, maximum) if maximum < 1 else 1.0
        kept.append(replace(part, weight=part.weight * (high - low), low=low, high=high))
    total = sum(part.weight for part in kept)
    if total < EPSILON:
        raise UserError(
            f"The timestep distribution has nothing between {minimum:g} and {maximum:g} to preserve the shape "
            "of: widen --min-timestep and --max-timestep or leave out --preserve-distribution-shape."
        )
    return [replace(part, weight=part.weight / total) for part in kept]


@lru_cache
def distribution(settings: Timesteps, tokens: int) -> tuple[Part, ...]:
    """The parts that levels are drawn from: cut to the range if the shape is to be preserved, else whole."""
    parts = parts_of(settings, tokens)
    return tuple(truncate(parts, settings.minimum, settings.maximum) if settings.preserve_shape else parts)


def evaluate(parts: Sequence[Part], u: Tensor) -> Tensor:
    """Levels of u (B,): u picks a part by the parts' weights, and its rest the place within that part."""
    if len(parts) == 1:
        return _within(parts[0], u)
    t = torch.empty_like(u)
    start = 0.0
    for i, part in enumerate(parts):
        end = start + part.weight
        here = (u >= start) & ((u < end) | (i == len(parts) - 1))
        t[here] = _within(part, u[here] - start)
        start = end
    return t


def _within(part: Part, u: Tensor) -> Tensor:
    """Levels of u (B,) in 0..part.weight."""
    inner = (u / max(part.weight, EPSILON)).clamp(EPSILON, 1 - EPSILON)
    return part.quantile(part.low + inner * (part.high - part.low))


def levels(settings: Timesteps, u: Tensor, tokens: int) -> Tensor:
    """Noise levels (B,), float32, for uniform u (B,) float64 and pictures of `tokens` target tokens.

    A limited range squeezes the distribution into it, or cuts off what lies outside with `preserve_shape`.
    """
    low, high = settings.minimum, settings.maximum
    t = evaluate(distribution(settings, tokens), u)
    return (t.clamp(low, high) if settings.preserve_shape else low + (high - low) * t).float()


def loss_weights(weighting: str, t: Tensor) -> Tensor:
    """What the loss at levels t (B,) is multiplied with: (B,)."""
    if weighting == "sigma_sqrt":
        return t.clamp(min=SMALLEST_WEIGHTED) ** -2
    if weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * t + 2 * t**2))
    return torch.ones_like(t)


def stratified(count: int, buckets: int, generator: Generator) -> Tensor:
    """`count` uniform numbers, float64, of which each of `buckets` equal ranges of 0..1 gets its share.

    Shares differ by at most one; the order is random.
    """
    whole, rest = divmod(count, buckets)
    extra = torch.randperm(buckets, generator=generator)[:rest]
    bucket = torch.cat((torch.arange(buckets).repeat(whole), extra))
    bucket = bucket[torch.randperm(count, generator=generator)]
    return (bucket + torch.rand(count, generator=generator, dtype=torch.float64)) / buckets
