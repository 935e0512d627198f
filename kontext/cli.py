"""The program `kontext`: a command per options model, and what becomes of errors.

Exit codes: 0 done; 1 a defect of the program; 2 something the user can put right; 130 Ctrl-C.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import astuple
from importlib import import_module
from inspect import Parameter, Signature, getdoc
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from kontext import __version__, console
from kontext.errors import UserError
from kontext.options import COMMANDS, argv, config_file
from kontext.options.base import Options, flag_name
from kontext.options.reference import sections
from kontext.options.resolve import resolve
from kontext.options.spec import Spec, nearest, specs

MEMORY_ADVICE = {
    "fp8_scaled": "--fp8-scaled",
    "fp8_t5": "--fp8-t5",
    "blocks_to_swap": "--blocks-to-swap",
    "gradient_checkpointing": "--gradient-checkpointing",
    "batch_size": "a smaller --batch-size",
    "image_size": "a smaller --image-size",
}
HELP_ENTRY = ("--help", "", "Show this page and exit.", ("also -h",))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code. `arguments` default to the program's own."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    codes: list[int] = []
    code = guarded(lambda: codes.append(_dispatch(given)), debug="--debug" in given)
    return code or codes[0]


def guarded(action: Callable[[], Any], *, debug: bool, model: type[Options] = Options) -> int:
    """Run `action`; show what it raises in one line, and return the exit code.

    model: the options of the command, of which an out-of-memory message names those that help.
    """
    try:
        action()
        return 0
    except KeyboardInterrupt:
        console.say("Interrupted.")
        return 130
    except Exception as error:
        if debug:
            console.traceback(error)
        return _report(error, model)


def _report(error: Exception, model: type[Options]) -> int:
    if isinstance(error, UserError):
        for line in str(error).splitlines():
            console.error(line)
        return 2
    if _out_of_memory(error):
        options = [words for name, words in MEMORY_ADVICE.items() if name in model.model_fields]
        remedy = f" Try {', '.join(options)}." if options else ""
        console.error(f"Out of memory.{remedy} ({_first_line(error)})")
        return 2
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        console.error(f"{where}{error.strerror}.")
        return 2
    console.error(f"{type(error).__name__}: {_first_line(error)} (run again with --debug for the traceback)")
    return 1


def _out_of_memory(error: Exception) -> bool:
    """By name and words: torch, which raises it, is not imported for this."""
    named = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return named or isinstance(error, MemoryError) or "DefaultCPUAllocator: " in str(error)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def _dispatch(arguments: list[str]) -> int:
    """Find the command, put its arguments into canonical form, and let Typer call it."""
    if arguments and not arguments[0].startswith("-"):
        name = arguments[0].replace("_", "-")
        if name not in COMMANDS:
            match = nearest(name, COMMANDS)
            hint = f"Did you mean {match}?" if match else f"The commands are {', '.join(COMMANDS)}."
            raise UserError(f"There is no command '{arguments[0]}'. {hint}")
        arguments = [name, *argv.canonical(arguments[1:], COMMANDS[name][1])]
    elif (first := (arguments or ["--help"])[0]) not in ("--version", *argv.HELP):
        raise UserError(f"'{first}' must come after a command: kontext {' | '.join(COMMANDS)}.")
    result = _app()(arguments or ["--help"], prog_name="kontext", standalone_mode=False)
    return int(result or 0)


def _app() -> typer.Typer:
    app = typer.Typer(
        cls=_Group,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": list(argv.HELP)},
    )
    app.callback()(_program)
    for name, (module, model) in COMMANDS.items():
        app.command(name, cls=_Command)(_command(module, model))
    return app


class _Group(TyperGroup):
    """The program; its help names the commands."""

    def format_help(self, ctx: typer.Context, formatter: Any) -> None:
        own = ("--version", "", "Show the version and exit.", ())
        commands = [(name, "", _title(model), ()) for name, (_, model) in COMMANDS.items()]
        console.help_page(
            "kontext COMMAND [OPTIONS]",
            "Fine-tune FLUX.1 Kontext and edit pictures with it.",
            [("Commands", commands), ("Options", [own, HELP_ENTRY])],
        )


class _Command(TyperCommand):
    """A command; its help shows the options by group."""

    def format_help(self, ctx: typer.Context, formatter: Any) -> None:
        model = COMMANDS[str(self.name)][1]
        panels = [(title, [astuple(entry) for entry in entries]) for title, entries in sections(model)]
        panels[-1][1].append(HELP_ENTRY)
        console.help_page(f"kontext {self.name} [OPTIONS]", getdoc(model) or "", panels)


def _title(model: type[Options]) -> str:
    return (getdoc(model) or "").splitlines()[0]


def _show_version(wanted: bool) -> None:
    if wanted:
        console.output(f"kontext {__version__}")
        raise typer.Exit


def _program(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Options of the program itself."""


def _command(module: str, model: type[Options]) -> Callable[..., int]:
    """The function that Typer calls, with a signature made from the model."""

    def run(context: typer.Context, **values: Any) -> int:
        given = {name: value for name, value in values.items() if _from_user(context, name)}
        for spec in specs(model):
            if given.pop(_negation(spec), False):
                given[spec.name] = False
        options = resolve(model, given)
        if options.print_config:
            console.output(config_file.render(options))
            return 0
        return guarded(lambda: import_module(module).run(options), debug=options.debug, model=model)

    parameters = [parameter for spec in specs(model) for parameter in _parameters(spec)]
    context = Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context)
    run.__signature__ = Signature([context, *parameters], return_annotation=int)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (context, *parameters)}
    return run


def _from_user(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _negation(spec: Spec) -> str:
    return f"not_{spec.name}"


def _parameters(spec: Spec) -> list[Parameter]:
    """An option of Typer; a switch that is off by default has a second one, which overrides a config file."""
    if spec.kind != "switch":
        annotation, default = (list[str], []) if spec.kind == "list" else (str, None)
        return [_parameter(spec.name, annotation, default, spec.flag)]
    off = flag_name(spec.off)
    if spec.default:
        return [_parameter(spec.name, bool, True, f"{spec.flag}/{off}")]
    return [
        _parameter(spec.name, bool, False, spec.flag),
        _parameter(_negation(spec), bool, False, off),
    ]


def _parameter(name: str, annotation: Any, default: Any, declared: str) -> Parameter:
    option = typer.Option(default, declared)
    return Parameter(name, Parameter.KEYWORD_ONLY, default=option, annotation=annotation)
