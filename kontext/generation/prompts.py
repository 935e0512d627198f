"""Prompt lines: `a cat on a mat --w 1024 --h 768 --d 42 --ci photo.png`, from a file or typed in."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from kontext.errors import UserError
from kontext.generation.request import Request
from kontext.generation.words import WORDS, Word, word_key


def parse_line(line: str, base: Request, where: str) -> Request:
    """`base` with what the line sets. The prompt ends at the first ` --`; values may contain spaces.

    Raises UserError, beginning with `where`, for an unknown, repeated or unreadable option and an empty prompt.
    """
    prompt, *pieces = (" " + line).split(" --")
    prompt = prompt.strip() or base.prompt
    if not prompt:
        raise UserError(f"{where}: there is no prompt before the options.")
    settings = []
    for piece in pieces:
        name, _, text = piece.strip().partition(" ")
        key = word_key(name)
        if key is None:
            known = " ".join("--" + key.replace("_", "-") for key in WORDS)
            raise UserError(f"{where}: unknown option --{name}; a prompt line knows {known}.")
        settings.append((key, text.strip(), f"{where}: --{name}"))
    return change(base, {"prompt": prompt}, settings)


def change(base: Request, changes: Mapping[str, object], settings: Iterable[tuple[str, str, str]]) -> Request:
    """`base` with `changes` and `settings`: key of WORDS, text, and where it stands (for messages).

    Raises UserError for a repeated or unreadable setting.
    """
    changes = dict(changes)
    for key, text, where in settings:
        _set(changes, WORDS[key], text, where)
    if changes.get("flow_shift") == 0:
        changes["flow_shift"] = None
    return replace(base, **changes)


def _set(changes: dict[str, object], word: Word, text: str, where: str) -> None:
    if word.field in changes and not word.repeatable:
        raise UserError(f"{where} is given twice.")
    try:
        value = word.read(text)
    except (ValueError, OverflowError):
        raise UserError(f"{where} needs {word.expects}, not {text!r}.") from None
    changes[word.field] = (*changes.get(word.field, ()), value) if word.repeatable else value


def read_lines(text: str, base: Request, path: Path) -> list[Request]:
    """A request for each line; blank lines and lines that begin with # are left out."""
    numbered = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    return [
        parse_line(line, base, f"{path}, line {number}")
        for number, line in numbered
        if line and not line.startswith("#")
    ]
