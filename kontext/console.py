"""The only place that prints: rich on a terminal, plain lines in a log file or a pipe.

Everything goes to stderr except what a user asked for and may pipe (`output`, `table(..., asked=True)`).
In a run of several processes only the first one speaks, but for errors.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from traceback import format_exception
from typing import TYPE_CHECKING, Literal, Protocol

from rich.console import Console
from rich.measure import Measurement
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

SECONDS_BETWEEN_LINES = 5.0


@cache
def _console(stderr: bool, quiet: bool) -> Console:
    return Console(stderr=stderr, quiet=quiet)


def _process() -> int:
    """The number of this process among those that accelerate or torchrun started."""
    return int(os.environ.get("RANK", "0"))


def _stderr() -> Console:
    return _console(stderr=True, quiet=_process() > 0)


def _stdout() -> Console:
    return _console(stderr=False, quiet=_process() > 0)


def _line(console: Console, label: str, style: str, text: str) -> None:
    """One message, never wrapped (a path stays in one piece) and never read as markup."""
    console.print(Text.assemble((label, f"bold {style}"), text), soft_wrap=True, highlight=False)


def say(text: str) -> None:
    """What is being done."""
    _line(_stderr(), "", "default", text)


def notice(text: str) -> None:
    """Something was decided or changed for the user: a size was rounded, a file was skipped."""
    remark(Remark("note", text))


def warn(text: str) -> None:
    """Something is probably not what the user wants."""
    remark(Remark("warning", text))


@dataclass(frozen=True)
class Remark:
    """What `notice` (kind note) or `warn` (kind warning) says."""

    kind: Literal["note", "warning"]
    text: str


_overheard: list[list[Remark]] = []


def remark(said: Remark) -> None:
    """Says it as `notice` or `warn` would."""
    for heard in _overheard:
        heard.append(said)
    _line(_stderr(), f"{said.kind}: ", "cyan" if said.kind == "note" else "yellow", said.text)


@contextmanager
def overheard() -> Iterator[list[Remark]]:
    """The remarks made within, also those of a process that is not heard: for the one that is."""
    heard: list[Remark] = []
    _overheard.append(heard)
    try:
        yield heard
    finally:
        _overheard.pop()


def error(text: str) -> None:
    """Why the program ends; every process may say it."""
    label = f"error (process {_process()}): " if _process() else "error: "
    _line(_console(stderr=True, quiet=False), label, "red", text)


def traceback(error: BaseException) -> None:
    """Where an error comes from, for `--debug`."""
    _line(_console(stderr=True, quiet=False), "", "default", "".join(format_exception(error)).rstrip())


def output(text: str) -> None:
    """What the user asked for, on stdout, unformatted."""
    _stdout().out(text, highlight=False)


def ask(mark: str) -> str | None:
    """A line that the user types behind `mark`; None at the end of the input (Ctrl-D)."""
    try:
        return _stderr().input(mark)
    except EOFError:
        return None


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, asked: bool = False
) -> None:
    """A table on stderr, or on stdout when the user asked for it. Numbers are aligned to the right."""
    console = _stdout() if asked else _stderr()
    grid = Table(title=title or None, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        grid.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(str(cell)) for cell in row))
    if not console.is_terminal:  # a file has no width: nothing is cut or folded
        width = Measurement.get(console, console.options.update(width=10_000), grid).maximum
        console = Console(file=console.file, width=width, quiet=console.quiet)
    console.print(grid)


HelpEntry = tuple[
    str, str, str, tuple[str, ...]
]  # name, what its value looks like, description, facts in short


def help_page(usage: str, description: str, panels: Sequence[tuple[str, Sequence[HelpEntry]]]) -> None:
    """The help of the program or of a command, on stdout: a panel with a title per group of entries."""
    console = _stdout()
    console.print(Text.assemble(("Usage: ", "bold yellow"), usage))
    console.print(Text(f"\n{description}\n"))
    widest = max(len(f"{name} {metavar}") for _, entries in panels for name, metavar, _, _ in entries)
    for title, entries in panels:
        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(width=min(widest, console.width * 2 // 5))
        grid.add_column(ratio=1)
        for name, metavar, text, notes in entries:
            facts = [(f" [{note}]", "red" if note == "required" else "dim") for note in notes]
            grid.add_row(
                Text.assemble((name, "bold cyan"), " ", (metavar, "yellow")), Text.assemble(text, *facts)
            )
        console.print(Panel(grid, title=Text(title), title_align="left", border_style="dim"))


class Progress(Protocol):
    """What `progress` yields."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` units as done and show `note` (loss, file name ...) after the figures."""


@contextmanager
def progress(title: str, total: int, *, unit: str = "it", done: int = 0) -> Iterator[Progress]:
    """Show how far a loop of `total` units is, with its speed and the time left.

    On a terminal a live line; else at most one plain line every few seconds, and the last.
    done: units that an earlier run has finished already.
    """
    console = _stderr()
    if not console.is_terminal:
        lines = _Lines(title, total, unit, done)
        try:
            yield lines
        finally:
            lines.finish()
        return
    with _live_columns(console) as live:
        yield _Live(live, live.add_task(title, total=total, completed=done, speed="", note=""), unit)


def _live_columns(console: Console) -> "RichProgress":
    from rich import progress as columns  # only commands that run need it

    note = Column(
        ratio=1, no_wrap=True, overflow="ellipsis"
    )  # what does not fit is cut here and nowhere else
    return columns.Progress(
        columns.SpinnerColumn(finished_text="[green]✓"),
        columns.TextColumn("{task.description}", markup=False),
        columns.BarColumn(bar_width=24 if console.width >= 120 else 8),
        columns.MofNCompleteColumn(),
        columns.TextColumn("{task.fields[speed]}", style="cyan", markup=False),
        columns.TimeRemainingColumn(),
        columns.TextColumn("{task.fields[note]}", markup=False, table_column=note),
        console=console,
        expand=True,
    )


class _Live:
    """Progress on a terminal."""

    def __init__(self, live: "RichProgress", task: "TaskID", unit: str) -> None:
        self.live, self.task, self.unit = live, task, unit

    def advance(self, count: int = 1, note: str = "") -> None:
        speed = _speed(self.live.tasks[0].speed, self.unit)
        self.live.update(self.task, advance=count, note=note, speed=speed)


class _Lines:
    """Progress in a log file."""

    def __init__(self, title: str, total: int, unit: str, done: int) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self.first = done
        self.begin = self.shown = time.monotonic()
        self.note = ""
        self.pending = False

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        self.note = note
        self.pending = True
        if time.monotonic() - self.shown >= SECONDS_BETWEEN_LINES:
            self._show()

    def finish(self) -> None:
        """Show the last state unless it has been shown."""
        if self.pending:
            self._show()

    def _show(self) -> None:
        self.shown = time.monotonic()
        self.pending = False
        speed = (self.done - self.first) / max(self.shown - self.begin, 1e-9)
        left = _clock((self.total - self.done) / speed) if speed > 0 else "?"
        parts = [
            f"{self.title}: {self.done}/{self.total}",
            _speed(speed, self.unit),
            f"{left} left",
            self.note,
        ]
        say("  ".join(part for part in parts if part))


def _speed(per_second: float | None, unit: str) -> str:
    if not per_second:
        return ""
    return f"{per_second:.2f} {unit}/s" if per_second >= 1 else f"{1 / per_second:.2f} s/{unit}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
