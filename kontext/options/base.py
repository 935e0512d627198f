"""How an option is declared: once, as a field of a frozen pydantic model.

The command line, the TOML config file, `--print-config` and the README's tables all derive from these
fields. Example of a group, and of a command that inherits it:

    class Vae(Options):
        '''Autoencoder'''                                   # first line: the title of the help panel
        vae: Path | None = option("Autoencoder weights.", default=None, aliases=("ae",))

    class CacheLatents(Vae, Common):
        '''Encode the pictures of a dataset.'''             # the help of the command
        vae: Path = required(Vae, "vae")                    # same option, now obligatory
        batch_size: int = option("Pictures per batch.", default=1, ge=1)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr
from pydantic_core import PydanticUndefined

from kontext.errors import UserError


class Options(BaseModel):
    """Base of every group of options and of every command's model."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        defer_build=True,  # `--help` needs no validators
    )

    def weights(self) -> tuple[Path, ...]:
        """Files and folders that the command is sure to load from, in that order."""
        return ()


def option(
    description: str,
    *,
    default: Any = PydanticUndefined,
    aliases: tuple[str, ...] = (),
    flags: Mapping[str, str] | None = None,
    command_line_only: bool = False,
    form: str | None = None,
    **bounds: Any,
) -> Any:
    """Declare one option; without a default it is required.

    aliases: other names of the same option, in snake_case (`("ae",)` makes `--ae` mean `--vae`).
    flags: names without a value that stand for one, `{"sdpa": "sdpa"}` makes `--sdpa` mean `--attn-mode sdpa`.
    command_line_only: neither read from a config file nor shown by `--print-config`.
    form: in words, what matches the pattern that is among the bounds.
    bounds: what pydantic's Field takes: ge, gt, le, lt, min_length, max_length, pattern.
    """
    assert ("pattern" in bounds) == (form is not None), "who reads the error need not read a pattern"
    extra = {
        "aliases": aliases,
        "flags": dict(flags or {}),
        "command_line_only": command_line_only,
        "form": form,
    }
    return Field(default, description=description, json_schema_extra=extra, **bounds)


def required(group: type[Options], name: str) -> Any:
    """The option `name` of `group` with the same words and aliases, but obligatory in the command that says so."""
    field = group.model_fields[name]
    assert field.description is not None and isinstance(field.json_schema_extra, dict)
    return option(field.description, **field.json_schema_extra)  # type: ignore[arg-type]


def optional(group: type[Options], name: str) -> Any:
    """The obligatory option `name` of `group`, with None as its default in the command that says so."""
    field = group.model_fields[name]
    assert field.description is not None and isinstance(field.json_schema_extra, dict)
    return option(field.description, default=None, **field.json_schema_extra)  # type: ignore[arg-type]


def without_secrets(options: Options) -> dict[str, Any]:
    """The options by name, but for tokens and keys: what may be shown, logged or written."""
    return {name: value for name, value in options.model_dump().items() if not isinstance(value, SecretStr)}


def secret_values(options: Options) -> list[str]:
    """The tokens and keys among the options."""
    values = (getattr(options, name) for name in type(options).model_fields)
    return [value.get_secret_value() for value in values if isinstance(value, SecretStr)]


def flag_name(name: str) -> str:
    """The command-line spelling of a field: `lora_weight` -> `--lora-weight`."""
    return "--" + name.replace("_", "-")


def need(options: Options, *names: str, because: str) -> None:
    """Raise UserError when one of the options is missing that this use of the command needs.

    because: the end of the sentence, for example "to make sample pictures (--sample-prompts)".
    """
    missing = [flag_name(name) for name in names if getattr(options, name) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} must be given {because}.")
