"""The program `kontext`: finds the command, shows help, and turns errors into messages and exit codes.

Exit codes: 0 done; 1 a defect of the program; 2 something the user can put right; 130 Ctrl-C.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import astuple
from inspect import getdoc
from typing import Any

from kontext import __version__, console
from kontext.allocation import reuse_freed_memory
from kontext.errors import UserError
from kontext.options import COMMANDS
from kontext.options.argv import canonical
from kontext.options.base import Options, flag_name
from kontext.options.config_file import render
from kontext.options.reference import sections
from kontext.options.resolve import resolve
from kontext.options.spec import nearest
from kontext.readahead import read_ahead

MEMORY_ADVICE = {
    "vram_budget": "--vram-budget auto",
    "fp8_scaled": "--fp8-scaled",
    "nf4": "--nf4",
    "fp8_t5": "--fp8-t5",
    "blocks_to_swap": "--blocks-to-swap",
    "gradient_checkpointing": "--gradient-checkpointing",
    "batch_size": "a smaller --batch-size",
    "image_size": "a smaller --image-size",
}
HELP = ("--help", "-h")
VERSION_ENTRY = ("--version", "", "Show the version and exit.", ())
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
    if str(error).startswith("DataLoader worker"):  # torch, of a process of its own
        fewer = [
            flag_name(name)
            for name in ("max_data_loader_n_workers", "num_workers")
            if name in model.model_fields
        ]
        console.error(
            f"A process that reads files has died, most often of memory. Try fewer ({', '.join(fewer)}); 0 reads in the "
            f"process itself. ({_first_line(error)})"
        )
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
    """Show help or the version, or find the command and run it."""
    first, *rest = arguments or ["--help"]
    if first in HELP:
        _show_commands()
        return 0
    if first == "--version":
        console.output(f"kontext {__version__}")
        return 0
    if first.startswith("-"):
        raise UserError(f"'{first}' must come after a command: kontext {' | '.join(COMMANDS)}.")
    name = first.replace("_", "-")
    if name not in COMMANDS:
        match = nearest(name, COMMANDS)
        hint = f"Did you mean {match}?" if match else f"The commands are {', '.join(COMMANDS)}."
        raise UserError(f"There is no command '{first}'. {hint}")
    return _run(name, rest)


def _run(name: str, arguments: list[str]) -> int:
    model = COMMANDS[name].model()
    if not set(arguments).isdisjoint(HELP):
        _show_options(name, model)
        return 0
    from kontext.app import parse  # Typer, which help does without

    options = resolve(model, parse(name, model, canonical(arguments, model)))
    if options.print_config:
        console.output(render(options))
        return 0
    reuse_freed_memory()
    read_ahead(options.weights())
    return guarded(lambda: COMMANDS[name].run()(options), debug=options.debug, model=model)


def _show_commands() -> None:
    commands = [(name, "", _doc(command.model()).splitlines()[0], ()) for name, command in COMMANDS.items()]
    console.help_page(
        "kontext COMMAND [OPTIONS]",
        "Fine-tune FLUX.1 Kontext and edit pictures with it.",
        [("Commands", commands), ("Options", [VERSION_ENTRY, HELP_ENTRY])],
    )


def _show_options(name: str, model: type[Options]) -> None:
    panels = [(title, [astuple(entry) for entry in entries]) for title, entries in sections(model)]
    panels[-1][1].append(HELP_ENTRY)
    console.help_page(f"kontext {name} [OPTIONS]", _doc(model), panels)


def _doc(model: type[Options]) -> str:
    return getdoc(model) or ""
