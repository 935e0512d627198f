"""Prompt lines: `a cat on a mat --w 1024 --h 768 --d 42 --ci photo.png`, from a file or typed in."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from kontext.errors import UserError
from kontext.generation.request import Request


@dataclass(frozen=True)
class _Word:
    """What an option letter sets: a field of Request, how its text is read, and what it expects."""

    field: str
    read: Callable[[str], object]
    expects: str
    repeatable: bool = False


def _at_least(smallest: float, kind: type) -> Callable[[str], object]:
    def read(text: str) -> object:
        value = kind(text)
        if not smallest <= value < float("inf"):
            raise ValueError(text)
        return value

    return read


def _path(text: str) -> Path:
    if not text:
        raise ValueError(text)
    return Path(text)


def _numbers(text: str) -> tuple[float, ...]:
    numbers = tuple(float(part) for part in text.replace(",", " ").split())
    if not numbers:
        raise ValueError(text)
    return numbers


WORDS: dict[str, _Word] = {
    "w": _Word("width", _at_least(1, int), "a width in pixels"),
    "h": _Word("height", _at_least(1, int), "a height in pixels"),
    "d": _Word("seed", _at_least(0, int), "a seed (a whole number)"),
    "s": _Word("steps", _at_least(1, int), "a number of steps"),
    "g": _Word("guidance", _at_least(0, float), "a guidance scale"),
    "fs": _Word("flow_shift", _at_least(0, float), "a flow shift (0: by resolution)"),
    "l": _Word("true_cfg_scale", _at_least(1, float), "a true guidance scale"),
    "n": _Word("negative_prompt", str, "a negative prompt"),
    "ci": _Word("references", _path, "a path to a reference image", repeatable=True),
    "m": _Word("multipliers", _numbers, "one multiplier per LoRA"),
}


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
        letter, _, text = piece.strip().partition(" ")
        if letter.lower() not in WORDS:
            known = " ".join(f"--{name}" for name in WORDS)
            raise UserError(f"{where}: unknown option --{letter}; a prompt line knows {known}.")
        settings.append((letter.lower(), text.strip(), f"{where}: --{letter}"))
    return change(base, {"prompt": prompt}, settings)


def change(base: Request, changes: Mapping[str, object], settings: Iterable[tuple[str, str, str]]) -> Request:
    """`base` with `changes` and `settings`: letter of WORDS, text, and where it stands (for messages).

    Raises UserError for a repeated or unreadable setting.
    """
    changes = dict(changes)
    for letter, text, where in settings:
        _set(changes, WORDS[letter], text, where)
    if changes.get("flow_shift") == 0:
        changes["flow_shift"] = None
    return replace(base, **changes)


def _set(changes: dict[str, object], word: _Word, text: str, where: str) -> None:
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
