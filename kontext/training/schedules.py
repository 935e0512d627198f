"""Learning rate schedules: plain functions of the step, so that resuming needs no state.

Formulas are those of `transformers.optimization`, whose names these are, and of REX (Chen et al. 2021).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from kontext.errors import UserError
from kontext.training.arguments import Value

REX_D = 0.9
POLYNOMIAL_END = 1e-7  # the learning rate at which `polynomial` ends, as in transformers
HALF_WAVE = 0.5
DECAYS = ("linear", "cosine", "1-sqrt")


@dataclass(frozen=True)
class LearningRate:
    """A learning rate `peak` and how it changes over `total` optimizer steps.

    `decay` steps and their `decay_type` count for warmup_stable_decay alone; `min_ratio` is the floor as a share of
    the peak; `waves` of a cosine are run through; `end` is the learning rate at which polynomial ends; `bend` is REX's
    d. `factors`: those of the steps after the warmup where the schedule is none of ours, the last one for all later.
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
    waves: float = HALF_WAVE
    end: float = POLYNOMIAL_END
    bend: float = REX_D
    decay_type: str = "cosine"
    factors: tuple[float, ...] = ()

    def factor(self, step: int) -> float:
        """What the learning rate of step `step`, counted from 0, is multiplied with."""
        if step < self.warmup:
            return step / self.warmup
        if self.factors:
            return self.factors[min(step - self.warmup, len(self.factors) - 1)]
        progress = (step - self.warmup) / max(1, self.total - self.warmup)
        return SCHEDULES[self.schedule](self, step, progress)


def _constant(rate: LearningRate, step: int, progress: float) -> float:
    return 1.0


def _linear(rate: LearningRate, step: int, progress: float) -> float:
    return max(0.0, 1 - progress)


def _cosine(rate: LearningRate, step: int, progress: float) -> float:
    return max(0.0, 0.5 * (1 + math.cos(2 * math.pi * rate.waves * progress)))


def _restarts(rate: LearningRate, step: int, progress: float) -> float:
    return 0.0 if progress >= 1 else 0.5 * (1 + math.cos(math.pi * (rate.cycles * progress % 1)))


def _polynomial(rate: LearningRate, step: int, progress: float) -> float:
    end = rate.end / rate.peak
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
    fall = _fall(rate, into / max(1, rate.decay)) if into < rate.decay else 0.0
    return rate.min_ratio + (1 - rate.min_ratio) * fall


def _fall(rate: LearningRate, progress: float) -> float:
    """From 1 to 0, in the way of `decay_type`."""
    if rate.decay_type == "linear":
        return 1 - progress
    return 1 - math.sqrt(progress) if rate.decay_type == "1-sqrt" else _cosine(rate, 0, progress)


def _rex(rate: LearningRate, step: int, progress: float) -> float:
    left = max(0.0, 1 - progress)
    return rate.min_ratio + (1 - rate.min_ratio) * left / (1 - rate.bend + rate.bend * left)


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


def _number(least: float, most: float = math.inf, *, whole: bool = False) -> Callable[[Value], bool]:
    kind = int if whole else (int, float)
    return lambda value: isinstance(value, kind) and not isinstance(value, bool) and least <= value <= most


_COUNT, _SHARE, _NOT_NEGATIVE = _number(1, whole=True), _number(0, 1), _number(0)
# What `--lr-scheduler-args` may set of each schedule, by transformers' names: the field, and whether a value is one.
ARGUMENTS: dict[str, dict[str, tuple[str, Callable[[Value], bool]]]] = {
    "cosine": {"num_cycles": ("waves", _NOT_NEGATIVE)},
    "cosine_with_restarts": {"num_cycles": ("cycles", _COUNT)},
    "polynomial": {"power": ("power", _NOT_NEGATIVE), "lr_end": ("end", _NOT_NEGATIVE)},
    "inverse_sqrt": {"timescale": ("timescale", _COUNT)},
    "cosine_with_min_lr": {
        "num_cycles": ("waves", _NOT_NEGATIVE), "min_lr_rate": ("min_ratio", _SHARE), "min_lr": ("min_lr", _NOT_NEGATIVE),
    },
    "warmup_stable_decay": {
        "num_decay_steps": ("decay", _COUNT), "min_lr_ratio": ("min_ratio", _SHARE),
        "decay_type": ("decay_type", DECAYS.__contains__), "num_cycles": ("waves", _NOT_NEGATIVE),
    },
    "rex": {"d": ("bend", _number(0, 0.999999)), "min_lr_ratio": ("min_ratio", _SHARE)},
}  # fmt: skip


def adjusted(rate: LearningRate, arguments: Mapping[str, Value]) -> LearningRate:
    """`rate` with the arguments of `--lr-scheduler-args`. Raises UserError for one that its schedule does not have."""
    known = ARGUMENTS.get(rate.schedule, {})
    fields: dict[str, Any] = {}
    for key, value in arguments.items():
        if key not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise UserError(f"--lr-scheduler-args: {rate.schedule} has no argument {key}; {has}.")
        field, fits = known[key]
        if not fits(value):
            raise UserError(f"--lr-scheduler-args: {key} of {rate.schedule} cannot be {value!r}.")
        fields[field] = value
    if "min_lr" in fields:
        fields["min_ratio"] = fields.pop("min_lr") / rate.peak
    return replace(rate, **fields)


def followed(rate: LearningRate, path: str, arguments: Mapping[str, Value]) -> LearningRate:
    """`rate` as the scheduler `path` (module.Class of torch's kind, or torch's own Class) changes it after the warmup.

    It is run through once, before training, so that a run that goes on needs no state of it. Raises UserError for
    what is no scheduler, does not take the arguments, or goes by more than the step.
    """
    kind = _scheduler_class(path)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate.peak, momentum=0.9)
    factors = []
    try:
        scheduler = kind(optimizer, **arguments)
        for _ in range(max(1, rate.total - rate.warmup)):
            factors.append(optimizer.param_groups[0]["lr"] / rate.peak)
            optimizer.step()
            scheduler.step()
    except (TypeError, ValueError) as error:
        raise UserError(f"--lr-scheduler-type {path} with --lr-scheduler-args: {error}.") from error
    return replace(rate, schedule=path, factors=tuple(map(float, factors)))


def _scheduler_class(path: str) -> type[LRScheduler]:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module or "torch.optim.lr_scheduler"), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"--lr-scheduler-type {path}: cannot be imported ({error}); it is module.Class."
        ) from error
    if not (isinstance(found, type) and issubclass(found, LRScheduler)):
        raise UserError(f"--lr-scheduler-type {path}: is not a torch learning rate scheduler.")
    return found
