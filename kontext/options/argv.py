"""The command line as a user writes it -> the canonical spelling that the parser knows."""

from collections.abc import Iterable, Sequence
from itertools import takewhile

from kontext.errors import UserError
from kontext.options.base import Options, flag_name
from kontext.options.spec import Meaning, names, nearest


def canonical(arguments: Sequence[str], model: type[Options]) -> list[str]:
    """Rewrite the arguments of one command.

    `--lora_weight a b` -> `--lora-weight=a --lora-weight=b`; aliases, flags (`--sdpa`) and negated
    switches become the option they stand for. Raises UserError for an unknown option (naming the
    nearest), a missing value, or an argument that belongs to no option.
    """
    known = names(model)
    rest = list(arguments)
    result: list[str] = []
    previous = ""
    while rest:
        written = rest.pop(0)
        if not written.startswith("--"):
            raise UserError(_stray(written, previous))
        name, equals, value = written.partition("=")
        previous = name
        meaning = known.get(_snake(name))
        if meaning is None:
            raise UserError(_unknown(name, known))
        values = [value] if equals else list(takewhile(_is_value, rest[: _greed(meaning)]))
        if not equals:
            del rest[: len(values)]
        result += _spell(name, meaning, values)
    return result


def _spell(written: str, meaning: Meaning, values: list[str]) -> list[str]:
    spec = meaning.spec
    if isinstance(meaning.value, bool):
        if values:
            raise UserError(f"{written} takes no value; leave out '={values[0]}'.")
        return [spec.flag if meaning.value else flag_name(spec.off)]
    if isinstance(meaning.value, str):
        return [f"{spec.flag}={meaning.value}"]
    if not values:
        raise UserError(f"{written} needs a value: {spec.noun}.")
    return [f"{spec.flag}={value}" for value in values]


def _greed(meaning: Meaning) -> int | None:
    """How many following arguments the option may take; None for any number."""
    if meaning.value is not None:
        return 0
    return None if meaning.spec.kind == "list" else 1


def _is_value(argument: str) -> bool:
    """Negative numbers and a lone dash are values; a value that begins with two dashes needs `--option=--x`."""
    return not argument.startswith("--")


def _snake(name: str) -> str:
    return name.removeprefix("--").replace("-", "_")


def _unknown(name: str, known: Iterable[str]) -> str:
    match = nearest(_snake(name), known)
    hint = f"Did you mean {flag_name(match)}?" if match else "--help lists them all."
    return f"There is no option {name}. {hint}"


def _stray(argument: str, previous: str) -> str:
    after = f" after {previous}" if previous else ""
    return f"Unexpected argument '{argument}'{after}. Put quotes around a value that contains spaces."
