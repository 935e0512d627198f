"""A run put together: the loop with everyone who listens to it, from the first step to the finished file."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kontext import console
from kontext.training.average import Average
from kontext.training.feed import Examples, feed
from kontext.training.interrupts import Interrupts
from kontext.training.journal import Journal
from kontext.training.loop import Listener, Outcome, Updates, train
from kontext.training.monitor import Log, Monitor
from kontext.training.names import Names
from kontext.training.objective import Objective
from kontext.training.previews import Previews
from kontext.training.saving import Saver, SaveRules
from kontext.training.state import Progress, load_state, save_state
from kontext.training.team import Team
from kontext.training.validation import Held, Validation
from kontext.training.writer import Job, Writer


@dataclass(frozen=True)
class Start:
    """Where a run begins: a state folder with what it says, or no folder and step 0."""

    folder: Path | None
    progress: Progress

    def load(self, updates: Updates, team: Team, average: Average | None = None) -> None:
        """Puts weights, optimizer, average and loss scale back. Raises UserError if the state is of another network."""
        if self.folder is None:
            return
        parameters, optimizer = updates.parameters, updates.optimizer
        means = load_state(self.folder, parameters=parameters, optimizer=optimizer, shares=team.shares)
        if average is not None:
            average.load(means)
        if self.progress.scaler:
            updates.scaler.load_state_dict(dict(self.progress.scaler))


def _unheard(path: Path) -> None:
    """Nobody wants to know of a file."""


def _written_elsewhere(path: Path, done: int) -> None:
    """Another process writes it; this one knows of it, and can name the state to go back to."""


@dataclass(frozen=True)
class Session:
    """Everything that a run is made of.

    settings: what a run that goes on from its states must have in common with it; adapter: called with a path and the
    steps done, copies the weights for a job that writes them; written: is called with weights and states that have
    been written; log: None for no logs; held: what is validated with; weights: as in Validation; workers, persistent:
    as in `feed`.
    """

    team: Team
    examples: Examples
    workers: int
    objective: Objective
    updates: Updates
    start: Start
    names: Names
    rules: SaveRules
    settings: Mapping[str, Any]
    average: Average | None
    adapter: Callable[[Path, int], Job]
    weights: Callable[[], AbstractContextManager[None]]
    previews: Previews | None
    held: Held | None
    log: Log | None
    journal: Journal
    written: Callable[[Path], None] = _unheard
    persistent: bool = True

    def run(self) -> None:
        """Trains to the end of the plan and saves.

        Raises KeyboardInterrupt after a Ctrl-C or SIGTERM, with a state saved; UserError when the loss is no number.
        """
        with Interrupts() as interrupts, self.journal, Writer() as writer, self.team.in_touch():
            saver = self._run(interrupts, writer)
            if self.team.saves:
                saver.finish()
                writer.wait()
        self.team.finish()

    def _run(self, interrupts: Interrupts, writer: Writer) -> Saver:
        plan, first = self.examples.plan, self.start.progress.step
        with console.progress("train", plan.steps, unit="step", done=first) as progress:
            monitor = Monitor(
                plan,
                self.team,
                progress,
                log=self.log,
                record=self.journal.step,
                last_state=lambda: saver.last_state,
                notes=self.start.progress.notes,
                measures=self._measures,
                scale=self.updates.scaler.get_scale if self.updates.scaler.is_enabled() else None,
            )
            validation = self._validation(monitor, writer)
            saver = self._saver(monitor, validation, writer)
            if self.team.leads:
                saver.tidy(first)
            if validation and self.start.progress.unvalidated:
                validation.begin(first, interrupts.asked)
            if self.previews:
                self.previews.begin(first, interrupts.asked)
            self._train(self._listeners(interrupts, monitor, validation, saver, writer))
            monitor.flush()
        return saver

    def _measures(self) -> dict[str, float]:
        weights = [parameter.detach() for parameter in self.updates.parameters.values()]
        limit = self.updates.limit
        return {"adapter_norm": self.team.norm(weights).item(), **(limit.measures() if limit else {})}

    def _save(self, writer: Writer) -> Callable[[Path, int], None]:
        """What has weights written after so many steps."""

        def save(path: Path, done: int) -> None:
            job = self.adapter(path, done)

            def write() -> None:
                job()
                self.written(path)

            writer.submit(write)

        return save

    def _validation(self, monitor: Monitor, writer: Writer) -> Validation | None:
        def tell(done: int, loss: float) -> None:
            monitor.validated(done, loss)
            self.journal.validation(done, loss)

        return self.held and Validation(
            self.held,
            self.objective,
            plan=self.examples.plan,
            team=self.team,
            weights=self.weights,
            write_adapter=self._save(writer),
            tell=tell,
            best=self.start.progress.best,
        )

    def _saver(self, monitor: Monitor, validation: Validation | None, writer: Writer) -> Saver:
        def write_state(folder: Path, done: int) -> None:
            writer.wait()  # a state says that all that was to be written before it is there
            progress = Progress(
                done,
                self.settings,
                self.updates.scaler.state_dict(),
                monitor.notes,
                validation.best if validation else self.start.progress.best,
                bool(validation and validation.broken_off),
            )
            save_state(
                folder,
                progress=progress,
                parameters=self.updates.parameters,
                optimizer=self.updates.optimizer,
                average=self.average.values if self.average else {},
                shares=self.team.shares,
                writes=self.team.leads,
            )
            self.written(folder)

        return Saver(
            self.names,
            self.rules,
            self.examples.plan,
            write_adapter=self._save(writer) if self.team.saves else _written_elsewhere,
            write_state=write_state if self.team.saves else _written_elsewhere,
            later=writer.submit if self.team.leads else lambda job: None,
            last_state=self.start.folder,
        )

    def _listeners(
        self,
        interrupts: Interrupts,
        monitor: Monitor,
        validation: Validation | None,
        saver: Saver,
        writer: Writer,
    ) -> list[Listener]:
        """In this order: what a loss that is no number stops must not have been saved, and states know the best loss."""

        def flush(outcome: Outcome) -> None:
            drawn = self.previews and self.previews.rhythm.label(outcome.step, self.examples.plan)
            if saver.due(outcome.step) or drawn:  # logs take no step after a later one
                monitor.flush()
                self.journal.flush()

        def stop(outcome: Outcome) -> None:
            broken_off = any(each.broken_off for each in slow)
            last = outcome.step + 1 == self.examples.plan.steps
            if broken_off or (not last and self.team.any_before(interrupts.requested)):
                monitor.flush()
                self.journal.flush()
                if self.team.saves:
                    saver.interrupted(outcome.step + 1)
                self.team.gather(None)  # a launcher that sees one end is going to end the one that saves
                raise KeyboardInterrupt

        slow = [each for each in (validation, self.previews) if each]
        validating = [partial(validation, stop=interrupts.asked)] if validation else []
        previews = [partial(self.previews, stop=interrupts.asked)] if self.previews else []
        averaging = [self.average] if self.average else []
        return [
            lambda outcome: writer.check(),
            monitor,
            *averaging,
            *validating,
            flush,
            saver,
            *previews,
            self.journal.listener(saver.due),
            stop,
        ]

    def _train(self, listeners: list[Listener]) -> None:
        first = self.start.progress.step
        examples = feed(
            self.examples,
            first_step=first,
            rank=self.team.rank,
            workers=self.workers,
            persistent=self.persistent,
            device=self.team.device,
            together=self.team.together,
        )
        train(
            self.objective,
            self.updates,
            plan=self.examples.plan,
            examples=examples,
            team=self.team,
            seed=self.examples.seed,
            first_step=first,
            listeners=listeners,
        )
