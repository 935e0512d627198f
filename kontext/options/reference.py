"""The options in words: for `--help`, and for the tables of the README.

`python -m kontext.options.reference README.md` writes each command's table between its markers
`<!-- options:train -->` and `<!-- /options:train -->`.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from kontext.errors import UserError
from kontext.options import COMMANDS
from kontext.options.base import Options, flag_name
from kontext.options.config_file import toml_value
from kontext.options.spec import Spec, specs

LONGEST_METAVAR = 18


@dataclass(frozen=True)
class Entry:
    """One option: its flag, what its value looks like, what it does, and facts in short (choices, default ...)."""

    flag: str
    metavar: str
    description: str
    notes: tuple[str, ...]


def sections(model: type[Options]) -> Iterator[tuple[str, list[Entry]]]:
    """The groups of a command's options, each with its title."""
    for panel, group in groupby(specs(model), key=lambda spec: spec.panel):
        yield panel, [_entry(spec) for spec in group]


def markdown(model: type[Options]) -> str:
    """The options of a command as a Markdown table, a line per group."""
    lines = ["| Option | Meaning |", "|---|---|"]
    for panel, entries in sections(model):
        lines.append(f"| **{panel}** | |")
        for entry in entries:
            option = f"{entry.flag} {entry.metavar}".strip().replace("|", "\\|")
            meaning = "; ".join([entry.description.rstrip("."), *entry.notes])
            lines.append(f"| `{option}` | {_escape(meaning)} |")
    return "\n".join(lines)


def between_markers(text: str, command: str) -> str | None:
    """What a document has between the markers of a command, or None when it lacks them."""
    match = re.search(_pattern(command), text, re.DOTALL)
    return match[2].strip() if match else None


def fill(text: str) -> str:
    """The document with the table of every command between its markers."""
    for name, command in COMMANDS.items():
        if between_markers(text, name) is None:
            raise UserError(
                f"The document has no markers <!-- options:{name} --> and <!-- /options:{name} -->."
            )
        table = f"\n{markdown(command.model())}\n"
        text = re.sub(
            _pattern(name), lambda match, table=table: match[1] + table + match[3], text, flags=re.DOTALL
        )
    return text


def _pattern(command: str) -> str:
    return rf"(<!-- options:{command} -->)(.*?)(<!-- /options:{command} -->)"


def _entry(spec: Spec) -> Entry:
    short = len(spec.metavar) <= LONGEST_METAVAR
    flag = f"{spec.flag}/{flag_name(spec.off)}" if spec.kind == "switch" and spec.default else spec.flag
    return Entry(
        flag=flag,
        metavar="" if spec.kind == "switch" else spec.metavar if short else "choice",
        description=spec.description,
        notes=tuple(_notes(spec, short)),
    )


def _notes(spec: Spec, short: bool) -> Iterator[str]:
    if spec.required:
        yield "required"
    if not short:
        yield spec.metavar.replace("|", ", ")
    if spec.bounds:
        yield spec.bounds
    if default := _default(spec):
        yield f"default {default}"
    if spec.also:
        yield f"also {spec.also}"


def _default(spec: Spec) -> str:
    if spec.required or spec.kind == "switch" or spec.default in (None, [], ()):
        return ""
    if isinstance(spec.default, list | tuple):
        return " ".join(map(str, spec.default))
    return toml_value(spec.default) if isinstance(spec.default, bool | float) else str(spec.default)


def _escape(text: str) -> str:
    """Characters that Markdown or HTML would take for its own."""
    return re.sub(r"([\\|*_<>\[\]`])", r"\\\1", text)


def _main(path: Path) -> None:
    path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
