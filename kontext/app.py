"""The command line in canonical spelling -> the values that the user gave, by way of Typer.

A command's function has no parameters of its own: its signature is made from the options model.
"""

from collections.abc import Callable, Sequence
from inspect import Parameter, Signature
from typing import Any

import typer

from kontext.options.base import Options, flag_name
from kontext.options.spec import Spec, specs


def parse(name: str, model: type[Options], arguments: Sequence[str]) -> dict[str, Any]:
    """Field name -> text, list of texts or bool, for the options that stand on the command line."""
    given: dict[str, Any] = {}
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name)(_collector(model, given))
    app(list(arguments), prog_name=f"kontext {name}", standalone_mode=False)
    return given


def _collector(model: type[Options], given: dict[str, Any]) -> Callable[..., None]:
    """The function that Typer calls; it notes what the user gave and leaves defaults to the model."""

    def collect(context: typer.Context, **values: Any) -> None:
        given.update({name: value for name, value in values.items() if _from_user(context, name)})
        for spec in specs(model):
            if given.pop(_negation(spec), False):
                given[spec.name] = False

    parameters = [parameter for spec in specs(model) for parameter in _parameters(spec)]
    parameters.append(Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context))
    collect.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    collect.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return collect


def _from_user(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _negation(spec: Spec) -> str:
    return f"not_{spec.name}"


def _parameters(spec: Spec) -> list[Parameter]:
    """An option of Typer; a switch has a second one, with which the user overrides a config file or a default."""
    if spec.kind == "list":
        return [_parameter(spec.name, list[str], [], spec.flag)]
    if spec.kind == "value":
        return [_parameter(spec.name, str, None, spec.flag)]
    return [
        _parameter(spec.name, bool, False, spec.flag),
        _parameter(_negation(spec), bool, False, flag_name(spec.off)),
    ]


def _parameter(name: str, annotation: Any, default: Any, flag: str) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=typer.Option(default, flag), annotation=annotation)
