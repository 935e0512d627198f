"""Keeps the history of a run and writes its report, from the first step to whatever end the run comes to."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from kontext import console
from kontext.errors import UserError
from kontext.training.history import Recorder
from kontext.training.loop import Outcome
from kontext.training.report import About, State, write_report

HISTORY, REPORT = ".history.jsonl", ".html"  # endings of the files, behind the output name


class Journal:
    """Enter it before the first step; on leaving, the last report says how the run ended.

    What goes wrong here ends no training: there is a warning, and the journal stops.
    In a team only the leading process has one.
    """

    def __init__(self, history: Path, report: Path, about: About, *, done: int, wanted: bool = True) -> None:
        """done: steps of the run that goes on; 0 begins a new history. wanted: False keeps and writes nothing."""
        self._history, self._report, self._about, self._done = history, report, about, done
        self._wanted = wanted
        self._recorder: Recorder | None = None
        self._drawn = False

    def __enter__(self) -> "Journal":
        if self._wanted:
            self._guarded(self._begin)
        return self

    def _begin(self) -> None:
        self._recorder = Recorder(self._history, done=self._done)

    def step(self, outcome: Outcome, loss: float, norm: float) -> None:
        """After a step, as soon as its loss and gradient norm are known."""
        if (recorder := self._recorder) is not None:
            self._guarded(lambda: recorder.step(outcome, loss, norm))

    def validation(self, done: int, loss: float) -> None:
        """A validation loss after `done` steps."""
        if (recorder := self._recorder) is not None:
            self._guarded(lambda: recorder.validation(done, loss))

    def samples(self, done: int, label: str, pictures: Sequence[Path]) -> None:
        """Sample pictures made after `done` steps, in the order of the prompts."""
        if (recorder := self._recorder) is not None:
            self._drawn = True
            self._guarded(lambda: recorder.samples(done, label, [path.name for path in pictures]))
            self.flush()  # a run that goes on does not draw again what lies there

    def flush(self) -> None:
        """Brings the history to the disk: before a state is saved, so that no run goes on with a gap in it."""
        if self._recorder is not None:
            self._guarded(self._recorder.flush)

    def report(self, state: State = "running", note: str = "") -> None:
        """Writes the page as things stand."""
        if (recorder := self._recorder) is None:
            return
        self._drawn = False
        self.flush()
        self._guarded(
            lambda: write_report(self._report, recorder.history, about=self._about, state=state, note=note)
        )

    def listener(self, due: Callable[[int], bool]) -> Callable[[Outcome], None]:
        """What writes the page after steps (from 0) at which something is saved, or samples were made."""

        def listen(outcome: Outcome) -> None:
            if due(outcome.step) or self._drawn:
                self.report()

        return listen

    def _guarded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except (UserError, OSError) as error:
            self._recorder = None
            console.warn(f"The report {self._report} is not continued: {error}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.report("finished")
        elif issubclass(kind, KeyboardInterrupt):
            self.report("interrupted")
        else:
            self.report("stopped", str(error) if issubclass(kind, UserError) else f"{kind.__name__}: {error}")
        if kind is None and self._recorder is not None:
            console.say(f"Report: {self._report}")
