"""`kontext generate --interactive`: prompts and commands as they are typed in."""

from kontext.console import ask, error, say
from kontext.errors import UserError
from kontext.generation.batch import run_batch
from kontext.generation.outputs import Writer
from kontext.generation.pipeline import Kontext
from kontext.generation.prompt_files import key_of
from kontext.generation.prompts import change, parse_line
from kontext.generation.request import Request
from kontext.generation.words import LETTERS, WORDS

HELP = "A prompt makes a picture; options behind it hold for that picture alone: make it red --d 42 --ci photo.png"


def converse(kontext: Kontext, base: Request, writer: Writer, copies: int) -> None:
    """Pictures from lines as they are typed in, until Ctrl-D. Ctrl-C stops a picture, not the program."""
    say(
        "Type a prompt, with options such as --w 1024 --h 768 --d 42 --ci photo.png. /help lists all; Ctrl-D ends."
    )
    while (line := ask("> ")) is not None:
        try:
            if line.strip().startswith("/"):
                base = obey(line.strip(), base)
            elif line.strip():
                request = parse_line(line, base, "This line")
                for failure in run_batch(kontext, request.copies(copies), writer):
                    error(str(failure.error))
        except UserError as mistake:
            error(str(mistake))
        except KeyboardInterrupt:
            say("Stopped.")


def obey(command: str, base: Request) -> Request:
    """What `/help` or `/set name value` leaves of the settings. Raises UserError for another command."""
    verb, _, rest = command.partition(" ")
    if verb == "/help":
        _help()
        return base
    name, _, value = rest.strip().partition(" ")
    if verb != "/set" or not name:
        raise UserError(f"{command}: unknown; commands are /help and /set name value.")
    where = f"/set {name}"
    changed = change(base, {}, [(key_of(name, "/set"), value.strip(), where)])
    say(f"{name} is {value.strip()} from now on.")
    return changed


def _help() -> None:
    say(HELP)
    say("/set name value sets one for all that follow; names are these, by word or letter:")
    names = {letter: f"{name} (--{letter})" for name, letter in LETTERS.items()}
    for key, word in WORDS.items():
        say(f"  {names.get(key, key)}: {word.expects}")
