"""The loss on items that are not trained on, the same noise at the same levels each time.

Noise follows from the names of the items alone, neither from the run's seed nor from the batch size, and the loss is
not weighted: two runs can be compared whatever their options.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kontext import console
from kontext.data.batches import Batch
from kontext.timesteps import Timesteps
from kontext.training.ahead import Pass, prepared
from kontext.training.feed import Batches, Example
from kontext.training.interrupts import Stop, never
from kontext.training.loop import Outcome
from kontext.training.objective import Objective
from kontext.training.plan import Plan
from kontext.training.seeds import draw_noise
from kontext.training.team import Team

LEVELS = (0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True)
class Every:
    """When to validate: every so many steps and epochs, each epoch if neither is given, and always at the end."""

    steps: int | None = None
    epochs: int | None = None

    def due(self, step: int, plan: Plan) -> bool:
        """Whether to validate after step `step` (from 0)."""
        epochs = self.epochs or (None if self.steps else 1)
        by_epoch = epochs and plan.ends_epoch(step) and (plan.epoch(step) + 1) % epochs == 0
        by_step = self.steps and (step + 1) % self.steps == 0
        return bool(by_epoch or by_step or step + 1 == plan.steps)


@dataclass(frozen=True)
class Held:
    """The items held out: their batches, when they are looked at, and where the best adapter goes."""

    batches: Batches
    every: Every
    best_path: Path


class Validation:
    """Listens to the loop and validates when it is due; the adapter with the lowest loss is kept in a file.

    In a team every process has one, and computes its part of the batches. All know when the last one was `broken_off`:
    then it is made up for by `begin`, before training goes on.
    """

    def __init__(
        self,
        held: Held,
        objective: Objective,
        *,
        plan: Plan,
        team: Team,
        weights: Callable[[], AbstractContextManager[None]],
        write_adapter: Callable[[Path, int], None],
        tell: Callable[[int, float], None],
        best: float | None,
    ) -> None:
        """weights: within it the adapter has the weights to be used; tell: is called with the steps done and the loss.

        best: the lowest loss of the run that goes on.
        """
        self.held = held
        self.objective = replace(objective, timesteps=Timesteps())
        self.plan = plan
        self.team = team
        self.weights = weights
        self.write_adapter = write_adapter
        self.tell = tell
        self.best = best
        self.broken_off = False

    def begin(self, done: int, stop: Stop = never) -> None:
        """Before the first step: what was broken off after `done` steps. Raises KeyboardInterrupt when it is again."""
        self._validate(done, stop)
        if self.broken_off:
            raise KeyboardInterrupt

    def __call__(self, outcome: Outcome, stop: Stop = never) -> None:
        if self.held.every.due(outcome.step, self.plan):
            self._validate(outcome.step + 1, stop)

    def _validate(self, done: int, stop: Stop) -> None:
        loss = self.loss(stop)
        self.broken_off = loss is None
        if loss is None:
            if self.team.leads:
                console.notice(
                    f"The validation after step {done} is broken off. It is done when the run goes on."
                )
            return
        self.tell(done, loss)
        better = math.isfinite(loss) and (self.best is None or loss < self.best)
        if better:
            self.best = loss
        if self.team.leads:
            console.say(f"Validation loss after step {done}: {loss:.5f}{' (the best)' * better}")
        if better and self.team.saves:
            self.write_adapter(self.held.best_path, done)

    def loss(self, stop: Stop = never) -> float | None:
        """The mean square error over all items and levels, None if it was broken off in any process.

        Nothing of training changes, no random state either. stop: is asked between batches, but for processes that need
        one another for each.
        """
        transformer, device = self.objective.transformer, self.team.device
        stop = never if self.team.together else stop
        total, stopped = torch.zeros(2, dtype=torch.float64, device=device), False
        with evaluating(transformer), self.weights(), torch.no_grad():
            for asked in prepared(self._passes(), transformer, self.objective.guidance, device):
                if stopped := stop():
                    break
                losses = self.objective.losses(asked).double()
                total += asked.example.share * torch.stack([losses, torch.ones_like(losses)]).sum(1)
        summed, count, broken = self.team.sum(torch.cat([total, total.new_full((1,), stopped)])).tolist()
        return None if broken else summed / count

    def _passes(self) -> Iterator[Pass]:
        """This process' batches with their noise, each at all levels. Processes that share a model take as many."""
        batches, team = range(len(self.held.batches.sizes(0))), self.team
        mine = [(index, 1.0) for index in batches[team.rank :: team.size]]
        if team.together and team.rank >= len(batches) % team.size > 0:
            mine.append((0, 0.0))  # does not count
        for index, share in mine:
            example = replace(example_of(self.held.batches.load(0, index), index), share=share)
            for level in LEVELS:
                yield Pass(example, torch.full_like(example.u, level).float())


def example_of(batch: Batch, index: int) -> Example:
    """A batch with the noise that belongs to its items."""
    shape = (1, *batch.latents.shape[1:])
    noise = torch.cat([draw_noise(shape, "validation", key) for key in batch.keys])
    return Example(epoch=0, index=index, share=1.0, batch=batch, noise=noise, u=torch.zeros(len(batch.keys)))


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Dropout is off within it."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
