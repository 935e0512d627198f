"""The options of every command, declared once as pydantic models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kontext.options.base import Options


@dataclass(frozen=True)
class Command:
    """Where a command is found; nothing is imported before it is asked for, which keeps `--help` fast.

    module: has `run(options)`.
    options: module and class of its model, as `module:Class`.
    """

    module: str
    options: str

    def model(self) -> type[Options]:
        module, _, name = self.options.partition(":")
        model: type[Options] = getattr(import_module(module), name)
        return model

    def run(self) -> Callable[[Options], None]:
        run: Callable[[Options], None] = import_module(self.module).run
        return run


COMMANDS: dict[str, Command] = {
    "cache-latents": Command("kontext.commands.cache_latents", "kontext.options.cache:CacheLatents"),
    "cache-text": Command("kontext.commands.cache_text", "kontext.options.cache:CacheText"),
    "train": Command("kontext.commands.train", "kontext.options.train:Train"),
    "generate": Command("kontext.commands.generate", "kontext.options.generate:Generate"),
    "merge": Command("kontext.commands.merge", "kontext.options.merge:Merge"),
}
