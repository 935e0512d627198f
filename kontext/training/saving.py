"""When a run saves what, and what it deletes again."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kontext import console
from kontext.training.loop import Outcome
from kontext.training.names import AVERAGE, STATE, Names
from kontext.training.plan import Plan
from kontext.training.writer import Job

Write = Callable[[Path, int], None]
"""Called with the path to write and the number of steps that are done."""


@dataclass(frozen=True)
class Keep:
    """How much of what was saved stays: files of the last `epochs` saves, and of the last `steps` steps."""

    epochs: int | None = None
    steps: int | None = None


@dataclass(frozen=True)
class SaveRules:
    """Every how many epochs and steps to save, what to keep, and whether to save states too."""

    every_epochs: int | None = None
    every_steps: int | None = None
    adapters: Keep = Keep()
    states: Keep = Keep()
    with_state: bool = False
    state_at_end: bool = False

    def at_epoch(self, step: int, plan: Plan) -> bool:
        """Whether step `step` (counted from 0) ends an epoch that is saved; the last step of the run does not."""
        every, epoch = self.every_epochs, plan.epoch(step) + 1
        return bool(every) and plan.ends_epoch(step) and epoch % every == 0 and step + 1 < plan.steps

    def at_step(self, step: int) -> bool:
        return bool(self.every_steps) and (step + 1) % self.every_steps == 0


class Saver:
    """Listens to the loop and saves when it is due."""

    def __init__(
        self,
        names: Names,
        rules: SaveRules,
        plan: Plan,
        *,
        write_adapter: Write,
        write_state: Write,
        later: Callable[[Job], None],
        last_state: Path | None = None,
    ) -> None:
        """later: does a job when all that was to be written before is written. last_state: the one that the run came from."""
        self.names = names
        self.rules = rules
        self.plan = plan
        self.write_adapter = write_adapter
        self.write_state = write_state
        self.later = later
        self.last_state = last_state

    def due(self, step: int) -> bool:
        """Whether something is to be saved after step `step` (counted from 0), the end of the run aside."""
        return self._epoch_due(step) or self._step_due(step)

    def _epoch_due(self, step: int) -> bool:
        return self.rules.at_epoch(step, self.plan)

    def _step_due(self, step: int) -> bool:
        return self.rules.at_step(step)

    def __call__(self, outcome: Outcome) -> None:
        done, epoch = outcome.step + 1, self.plan.epoch(outcome.step) + 1
        by_step, by_epoch = self._step_due(outcome.step), self._epoch_due(outcome.step)
        if by_step:
            self.write_adapter(self.names.at_step(done), done)
        if by_epoch:
            self.write_adapter(self.names.at_epoch(epoch), done)
        if self.rules.with_state and (by_step or by_epoch):
            self.save_state(
                self.names.at_epoch(epoch, STATE) if by_epoch else self.names.at_step(done, STATE), done
            )
        if by_step or by_epoch:
            self.later(lambda: self._delete_old(done))

    def tidy(self, done: int) -> None:
        """Does what a run that was killed after `done` steps has not come to: deletes what is unfinished or too old."""
        for path in self.names.unfinished():
            _delete(path)
        if done:
            self._delete_old(done)

    def _delete_old(self, done: int) -> None:
        """Deletes what the rules do not keep after `done` steps."""
        epoch = self.plan.epoch(done - 1) + 1
        by_step, by_epoch = self._step_due(done - 1), self._epoch_due(done - 1)
        adapters, states = self.rules.adapters, self.rules.states
        weights = self.names.weights
        for ending, keep in ((weights, adapters), (AVERAGE + weights, adapters), (STATE, states)):
            if by_step and keep.steps:
                _delete_below(self.names.steps(ending), done - keep.steps)
            if by_epoch and keep.epochs:
                assert self.rules.every_epochs is not None
                _delete_below(self.names.epochs(ending), epoch - keep.epochs * self.rules.every_epochs + 1)

    def save_state(self, folder: Path, done: int) -> None:
        """Writes a state; from then on it is the one to go back to."""
        self.write_state(folder, done)
        self.last_state = folder

    def interrupted(self, done: int) -> None:
        """Saves a state on the way out, whether others are wanted or not: nothing that was learned is lost."""
        self.save_state(self.names.at_step(done, STATE), done)
        console.say(f"Saved {self.last_state}. Go on with --resume auto.")

    def finish(self) -> None:
        """Saves the finished adapter, and its state if wanted."""
        self.write_adapter(self.names.final(), self.plan.steps)
        if self.rules.state_at_end or self.rules.with_state:
            self.save_state(self.names.final(STATE), self.plan.steps)


def _delete_below(numbered: Mapping[int, Path], oldest: int) -> None:
    """Deletes the files and folders with a number below `oldest`."""
    for number, path in numbered.items():
        if number < oldest:
            _delete(path)


def _delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
