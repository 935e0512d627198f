"""Learning rate schedules: plain functions of the step, so that resuming needs no state.

Formulas are those of `transformers.optimization`, whose names these are, and of REX (Chen et al. 2021).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

REX_D = 0.9
POLYNOMIAL_END = 1e-7  # the learning rate at which `polynomial` ends, as in transformers


@dataclass(frozen=True)
class LearningRate:
    """A learning rate `peak` and how it changes over `total` optimizer steps.

    `decay` steps count for warmup_stable_decay alone; `min_ratio` is the floor as a share of the peak.
    """

    peak: float
    schedule: str
    total: int
    warmup: int = 0
    decay: int = 0
    cycles: int = 1
    power: float = 1.0
    min_ratio: float = 0.0
    timescale: int | None = None

    def factor(self, step: int) -> float:
        """What the learning rate of step `step`, counted from 0, is multiplied with."""
        if step < self.warmup:
            return step / self.warmup
        progress = (step - self.warmup) / max(1, self.total - self.warmup)
        return SCHEDULES[self.schedule](self, step, progress)


def _constant(rate: LearningRate, step: int, progress: float) -> float:
    return 1.0


def _linear(rate: LearningRate, step: int, progress: float) -> float:
    return max(0.0, 1 - progress)


def _cosine(rate: LearningRate, step: int, progress: float) -> float:
    return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))


def _restarts(rate: LearningRate, step: int, progress: float) -> float:
    return 0.0 if progress >= 1 else 0.5 * (1 + math.cos(math.pi * (rate.cycles * progress % 1)))


def _polynomial(rate: LearningRate, step: int, progress: float) -> float:
    end = POLYNOMIAL_END / rate.peak
    return end if progress > 1 else (1 - end) * (1 - progress) ** rate.power + end


def _inverse_sqrt(rate: LearningRate, step: int, progress: float) -> float:
    timescale = rate.timescale or rate.warmup or 10_000
    return ((step + timescale - rate.warmup) / timescale) ** -0.5


def _cosine_with_floor(rate: LearningRate, step: int, progress: float) -> float:
    return rate.min_ratio + (1 - rate.min_ratio) * _cosine(rate, step, progress)


def _warmup_stable_decay(rate: LearningRate, step: int, progress: float) -> float:
    into = step - (rate.total - rate.decay)
    if into < 0:
        return 1.0
    fall = _cosine(rate, step, into / max(1, rate.decay)) if into < rate.decay else 0.0
    return rate.min_ratio + (1 - rate.min_ratio) * fall


def _rex(rate: LearningRate, step: int, progress: float) -> float:
    left = max(0.0, 1 - progress)
    return rate.min_ratio + (1 - rate.min_ratio) * left / (1 - REX_D + REX_D * left)


SCHEDULES: dict[str, Callable[[LearningRate, int, float], float]] = {
    "constant": _constant,
    "constant_with_warmup": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _restarts,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
    "cosine_with_min_lr": _cosine_with_floor,
    "warmup_stable_decay": _warmup_stable_decay,
    "rex": _rex,
}
