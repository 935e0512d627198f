"""Reading adapters for a command, which tells the user what they are and what in them is not used."""

from collections.abc import Sequence
from pathlib import Path

from kontext.console import say, warn
from kontext.lora.files import AdapterFile, read_adapter
from kontext.model.transformer import TransformerConfig

_SHOWN = 5


def read_adapters(
    paths: Sequence[Path], config: TransformerConfig, *, told: bool = True
) -> list[AdapterFile]:
    """Read every file, say what it is, and warn of its keys that are not applied. told: whether to say so.

    Raises UserError for a file of which nothing fits a transformer of `config`.
    """
    adapters = [read_adapter(path, config) for path in paths]
    for adapter in adapters if told else ():
        say(f"{adapter.path}: {', '.join(adapter.kinds)} ({adapter.family}), {len(adapter.modules)} modules.")
        _warn(adapter, adapter.unmatched, "fit no module")
        _warn(adapter, adapter.skipped, "are for text encoders")
    return adapters


def _warn(adapter: AdapterFile, keys: Sequence[str], what: str) -> None:
    if keys:
        more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
        warn(f"{adapter.path}: {len(keys)} keys {what}, not applied: {', '.join(keys[:_SHOWN])}{more}.")
