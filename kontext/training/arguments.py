"""`key=value` arguments of optimizers and networks."""

import ast
import warnings
from collections.abc import Sequence

from kontext.errors import UserError

Value = str | int | float | bool | None | tuple["Value", ...] | list["Value"] | dict["Value", "Value"]


def parse_arguments(words: Sequence[str], option: str) -> dict[str, Value]:
    """`["betas=0.9,0.99", "weight_decay=0.01"]` as values: Python literals where they are, else text.

    A value may contain `=`. Raises UserError, naming `option`, for a word without `=` and for a repeated key.
    """
    arguments: dict[str, Value] = {}
    for word in words:
        key, equals, text = word.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UserError(f"{option}: {word!r} is not of the form key=value.")
        if key in arguments:
            raise UserError(f"{option}: {key} is given twice.")
        arguments[key] = _value(text.strip())
    return arguments


def _value(text: str) -> Value:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the backslashes of regexes
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
