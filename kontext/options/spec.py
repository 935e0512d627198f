"""What the fields of an options model mean to the command line, to TOML and to the README."""

import difflib
import inspect
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from kontext.options.base import Options, flag_name

NOUNS = {
    int: "a whole number", float: "a number", str: "text", SecretStr: "text", Path: "a path", bool: "true or false",
}  # fmt: skip
METAVARS = {
    int: "integer", float: "number", str: "text", SecretStr: "text", Path: "path", bool: "true|false",
}  # fmt: skip
BOUNDS = {Ge: (">=", "ge"), Gt: (">", "gt"), Le: ("<=", "le"), Lt: ("<", "lt")}


@dataclass(frozen=True)
class Spec:
    """One option of one command.

    kind: a switch takes no value, a list takes several.
    metavar: what the values look like (`integer`, `a|b`); noun: the same in a sentence.
    bounds: `>=1, <=512`, or empty; form: in words, what a text must look like that has to match a pattern.
    off: the name that sets a switch to False.
    """

    name: str
    kind: Literal["switch", "value", "list"]
    panel: str
    description: str
    required: bool
    default: Any
    metavar: str
    noun: str
    bounds: str
    aliases: tuple[str, ...]
    flags: Mapping[str, str]
    command_line_only: bool
    form: str | None

    @property
    def flag(self) -> str:
        return flag_name(self.name)

    @property
    def off(self) -> str:
        return self.name.removeprefix("no_") if self.name.startswith("no_") else f"no_{self.name}"

    @property
    def also(self) -> str:
        """The other ways to write it, for help texts; empty when there are none."""
        names = [flag_name(alias) for alias in self.aliases]
        names += [f"{flag_name(flag)} for {value}" for flag, value in self.flags.items()]
        return ", ".join(names)


@dataclass(frozen=True)
class Meaning:
    """What one name on the command line or in TOML stands for.

    value: what the name alone sets (a switch, or a flag such as `sdpa`); None when a value must follow.
    """

    spec: Spec
    value: bool | str | None


@cache
def specs(model: type[Options]) -> tuple[Spec, ...]:
    """All options of a command: its own first, then those of its groups in the order it inherits them."""
    origin: dict[str, tuple[int, type]] = {}
    for index, (name, group) in enumerate((n, g) for g in model.__mro__ for n in inspect.get_annotations(g)):
        if name in model.model_fields:
            origin[name] = (index, group)  # a redeclared option stays with the group it comes from
    return tuple(
        _spec(name, model.model_fields[name], "Main options" if group is model else _title(group))
        for name, (_, group) in sorted(origin.items(), key=lambda item: item[1][0])
    )


@cache
def names(model: type[Options]) -> Mapping[str, Meaning]:
    """Every snake_case name that the command understands: fields, aliases, flags, and negated switches."""
    table: dict[str, Meaning] = {}
    for spec in specs(model):
        on = True if spec.kind == "switch" else None
        meanings = {name: Meaning(spec, on) for name in (spec.name, *spec.aliases)}
        meanings |= {name: Meaning(spec, value) for name, value in spec.flags.items()}
        taken = table.keys() & meanings.keys()
        assert not taken, f"{model.__name__}: {sorted(taken)} mean two options"
        table |= meanings
    negations = {spec.off: Meaning(spec, False) for spec in specs(model) if spec.kind == "switch"}
    return negations | table


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that a mistyped one most likely stands for."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def _title(group: type) -> str:
    return (group.__doc__ or "").strip().splitlines()[0].rstrip(".")


def _spec(name: str, field: FieldInfo, panel: str) -> Spec:
    extra = field.json_schema_extra
    assert isinstance(extra, dict) and field.description, f"{name} must be declared with option(...)"
    kind = _kind(field.annotation)
    return Spec(
        name=name,
        kind=kind,
        panel=panel,
        description=field.description,
        required=field.is_required(),
        default=None if field.is_required() else field.get_default(call_default_factory=True),
        metavar=_metavar(field.annotation),
        noun=_noun(field.annotation),
        bounds=_bounds(field),
        **extra,  # type: ignore[arg-type]
    )


def _members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a type: `int | None` -> (int,), `int | float` -> (int, float)."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(m for part in get_args(annotation) if part is not type(None) for m in _members(part))
    return (annotation,)


def _kind(annotation: Any) -> Literal["switch", "value", "list"]:
    (first, *others) = _members(annotation)
    if get_origin(first) in (list, tuple):
        return "list"
    return "switch" if first is bool and not others else "value"


def _metavar(annotation: Any) -> str:
    return "|".join(dict.fromkeys(_metavar_of(member) for member in _members(annotation)))


def _metavar_of(member: Any) -> str:
    arguments = get_args(member)
    if get_origin(member) is Literal:
        return "|".join(map(str, arguments))
    if get_origin(member) is list or arguments[1:] == (...,):
        return f"{_metavar(arguments[0])} ..."
    if get_origin(member) is tuple:
        return " ".join(map(_metavar, arguments))
    return METAVARS[member]


def _noun(annotation: Any) -> str:
    return " or ".join(dict.fromkeys(_noun_of(member) for member in _members(annotation)))


def _noun_of(member: Any) -> str:
    arguments = get_args(member)
    if get_origin(member) is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if get_origin(member) is list or arguments[1:] == (...,):
        return f"a list, each {_noun(arguments[0])}"
    if get_origin(member) is tuple:
        return f"{len(arguments)} values, each {_noun(arguments[0])}"
    return NOUNS[member]


def _bounds(field: FieldInfo) -> str:
    found = [(BOUNDS[type(item)], item) for item in field.metadata if type(item) in BOUNDS]
    return ", ".join(f"{sign}{getattr(item, key)}" for (sign, key), item in found)
