"""A moving average of the weights in training, saved beside them: it is less noisy than the last of them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from kontext.training.loop import Outcome
from kontext.training.names import ADAPTER, AVERAGE

PRECISION = torch.float32


def beside(path: Path) -> Path:
    """The file or folder of the average that belongs to a file or folder of weights."""
    stem = path.name.removesuffix(ADAPTER)
    return path.with_name(stem + AVERAGE + path.name[len(stem) :])


def decay_at(limit: float, done: int) -> float:
    """The share of the average that stays after `done` steps: `limit`, but less at first, so that the untrained
    weights are soon forgotten.
    """
    return min(limit, (1 + done) / (10 + done))


class Average:
    """Listens to the loop: mean <- decay * mean + (1 - decay) * weights after every step.

    values: the mean of each parameter by its name. It is part of a run's state. It is float32 where the weights are
    bfloat16, in which it would stand still: what a step adds is rounded away.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.values = {
            name: parameter.detach().to(PRECISION, copy=True) for name, parameter in parameters.items()
        }

    def __call__(self, outcome: Outcome) -> None:
        share = 1 - decay_at(self.decay, outcome.step + 1)
        means, weights = list(self.values.values()), list(self.parameters.values())
        with torch.no_grad():
            if weights[0].dtype == PRECISION:
                torch._foreach_lerp_(means, weights, share)
                return
            for mean, weight in zip(means, weights, strict=True):  # float32 copies of all would not fit
                mean.lerp_(weight.to(PRECISION), share)

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Goes on from a saved mean; from the parameters as they are if the saved run had none."""
        with torch.no_grad():
            for name, value in self.values.items():
                value.copy_(saved[name] if saved else self.parameters[name])

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Within, the parameters hold the mean. Afterwards every bit is as before."""
        kept = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._put(self.values)
        try:
            yield
        finally:
            self._put(kept)

    def _put(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])
