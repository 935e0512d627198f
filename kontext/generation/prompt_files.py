"""Files of prompts: text lines, or tables in JSONL files (an object on each line) and TOML files
(`[[pictures]]`).

    {"prompt": "make it red", "control_image": ["a.png"], "width": 1024, "seed": 1}
"""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path

from kontext.errors import UserError
from kontext.generation.prompts import change, read_lines
from kontext.generation.request import Request
from kontext.generation.words import LETTERS, WORDS, word_key


def from_table(table: object, base: Request, where: str) -> Request:
    """`base` with what a table sets, by the names of options or the letters of prompt lines.

    Raises UserError, beginning with `where`, for what is not a table, an unknown name and an unreadable value.
    """
    if not isinstance(table, Mapping):
        raise UserError(f'{where}: must be a table of names and values, such as {{"prompt": "make it red"}}.')
    values = dict(table)
    prompt = values.pop("prompt", base.prompt)
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{where}: prompt must be a text that is not empty.")
    pieces = [
        (key_of(name, where), text, f"{where}: {name}")
        for name, value in values.items()
        for text in _texts(name, value, where)
    ]
    return change(base, {"prompt": prompt.strip()}, pieces)


def key_of(name: str, where: str) -> str:
    """The key in WORDS of a setting, by its option or its letter. Raises UserError for an unknown one."""
    key = word_key(name)
    if key is None:
        known = [*LETTERS, *(key for key in WORDS if key not in LETTERS.values())]
        raise UserError(f"{where}: unknown setting {name}; known are prompt, {', '.join(known)}.")
    return key


def _texts(name: str, value: object, where: str) -> list[str]:
    """A value as prompt lines write it: a list of paths is several words, a list of numbers one."""
    word = WORDS[key_of(name, where)]
    if word.flag and isinstance(value, bool):
        return [str(value).lower()]
    if isinstance(value, list):
        texts = [_text(name, each, where) for each in value]
        return texts if word.repeatable else [" ".join(texts)]
    return [_text(name, value, where)]


def _text(name: str, value: object, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{where}: {name} cannot be {json.dumps(value, default=str)}.")
    return str(value)


def read_jsonl(text: str, base: Request, path: Path) -> list[Request]:
    """A request for each line; blank lines are left out. Raises UserError that names the line."""
    requests = []
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{path}, line {number}"
        if line.strip():
            try:
                table = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where}: is not JSON ({error}).") from None
            requests.append(from_table(table, base, where))
    return requests


def read_toml(text: str, base: Request, path: Path) -> list[Request]:
    """A request for each `[[pictures]]`. Raises UserError that names the entry."""
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: is not TOML ({error}).") from None
    pictures = content.pop("pictures", None)
    if content or not isinstance(pictures, list):
        raise UserError(f"{path}: must consist of [[pictures]] entries alone.")
    return [from_table(each, base, f"{path}, picture {number}") for number, each in enumerate(pictures, 1)]


READERS = {".jsonl": read_jsonl, ".toml": read_toml}
"""By the file's ending; all others hold lines."""


def read_prompt_file(path: Path, base: Request) -> list[Request]:
    """The requests of a file of prompts.

    Raises UserError that names the file and the line or entry for a bad one, and for a file that holds none.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: the prompt file cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError:
        raise UserError(f"{path}: the prompt file is not UTF-8 text.") from None
    requests = READERS.get(path.suffix.lower(), read_lines)(text, base, path)
    if not requests:
        raise UserError(f"{path}: the prompt file holds no prompt; write one per line.")
    return requests
