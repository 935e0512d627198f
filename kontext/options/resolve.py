"""Defaults, then the config file, then the command line -> one validated model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from kontext.errors import UserError
from kontext.options import config_file
from kontext.options.base import Options, flag_name
from kontext.options.spec import Spec, nearest, specs

COMPARISONS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}


def resolve(model: type[Options], given: Mapping[str, Any]) -> Options:
    """Build the command's options from what the command line gave (field name -> text, list or bool).

    Raises UserError with one line per fault, each naming the flag, or the file and its key.
    """
    path = given.get("config_file")
    read = config_file.read(Path(path), model) if path else {}
    values = {name: value for name, (_, value) in read.items()} | dict(given)
    places = {name: f"{path}: {key}" for name, (key, _) in read.items() if name not in given}
    try:
        return model(**values)
    except ValidationError as error:
        raise UserError("\n".join(_faults(error.errors(), model, values, places))) from None


def _faults(
    errors: list[ErrorDetails], model: type[Options], values: Mapping[str, Any], places: Mapping[str, str]
) -> list[str]:
    known = {spec.name: spec for spec in specs(model)}
    missing = [
        str(error["loc"][0]) for error in errors if error["type"] == "missing" and len(error["loc"]) == 1
    ]
    lines = [f"{_listed([flag_name(name) for name in missing])} must be given."] if missing else []
    seen = set(missing)
    for error in errors:
        if not error["loc"]:
            lines.append(_own_words(error))
        elif (name := str(error["loc"][0])) not in seen:
            seen.add(name)
            lines.append(f"{places.get(name, flag_name(name))}: {_reason(error, known[name], values[name])}")
    return lines


def _reason(error: ErrorDetails, spec: Spec, value: Any) -> str:
    """What is wrong with one value, in a sentence without the name of the option."""
    if error["type"] in ("value_error", "assertion_error"):
        return _own_words(error)
    if error["type"] in COMPARISONS:
        words, key = COMPARISONS[error["type"]]
        return f"must be {words} {error['ctx'][key]:.12g}, not {error['input']}."
    if error["type"] == "string_pattern_mismatch":
        return f"must be {spec.form}, not '{value}'."
    match = nearest(str(value), spec.metavar.split("|")) if error["type"] == "literal_error" else None
    hint = f" Did you mean {match}?" if match else ""
    given = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"must be {spec.noun}, not '{given}'.{hint}"


def _own_words(error: ErrorDetails) -> str:
    """The message of a ValueError that a model's own validator raised."""
    cause = error.get("ctx", {}).get("error")
    return str(cause) if cause else error["msg"]


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
