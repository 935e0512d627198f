"""Options from and to TOML: `--config-file` and `--print-config`."""

import json
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from kontext.errors import UserError
from kontext.options.base import Options, without_secrets
from kontext.options.spec import Meaning, names, nearest, specs


def read(path: Path, model: type[Options]) -> dict[str, tuple[str, Any]]:
    """The options of a TOML file: field name -> (key as written, value).

    Sections are only for reading. Keys are in kebab-case or snake_case, aliases included.
    Raises UserError for a file that cannot be read, an unknown key, or an option given twice.
    """
    known = {name: meaning for name, meaning in names(model).items() if not meaning.spec.command_line_only}
    found: dict[str, tuple[str, Any]] = {}
    for key, value in _flatten(_load(path)):
        meaning = known.get(key.replace("-", "_"))
        if meaning is None:
            raise UserError(f"{path}: {_unknown(key, known)}")
        name = meaning.spec.name
        if name in found:
            raise UserError(f"{path}: '{found[name][0]}' and '{key}' are the same option. Keep one of them.")
        found[name] = (key, _meant(path, key, value, meaning))
    return found


def render(options: Options) -> str:
    """The options as TOML, a comment per group; an option without a value has no line, nor has a token or key."""
    values = without_secrets(options)
    shown = [
        spec
        for spec in specs(type(options))
        if not spec.command_line_only and values.get(spec.name) is not None
    ]
    blocks = []
    for panel, group in groupby(shown, key=lambda spec: spec.panel):
        lines = [f"{spec.flag[2:]} = {toml_value(getattr(options, spec.name))}" for spec in group]
        blocks.append("\n".join([f"# {panel}", *lines]))
    return "\n\n".join(blocks)


def toml_value(value: Any) -> str:
    """A value of an option in TOML."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    # A JSON string is a TOML string, but for DEL, which TOML wants escaped.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _load(path: Path) -> dict[str, Any]:
    import tomllib  # help and most runs do without

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read the config file {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file in UTF-8.") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}.") from error


def _flatten(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flatten(value)
        else:
            yield key, value


def _meant(path: Path, key: str, value: Any, meaning: Meaning) -> Any:
    """The value of the field: a switch or flag of TOML says true or false, a list may be a single value."""
    if meaning.value is None:
        single = meaning.spec.kind == "list" and not isinstance(value, list)
        return [value] if single else value
    if not isinstance(value, bool):
        raise UserError(f"{path}: {key}: must be true or false, not {value!r}.")
    if isinstance(meaning.value, bool):
        return value is meaning.value
    if not value:
        raise UserError(f"{path}: {key} = false says nothing. Set {meaning.spec.flag[2:]} instead.")
    return meaning.value


def _unknown(key: str, known: Mapping[str, Meaning]) -> str:
    match = nearest(key.replace("-", "_"), known)
    hint = f"Did you mean '{match.replace('_', '-')}'?" if match else "--print-config shows the keys."
    return f"there is no option '{key}'. {hint}"
