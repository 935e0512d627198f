"""The options of every command, declared once as pydantic models."""

from kontext.options.base import Options
from kontext.options.cache import CacheLatents, CacheText
from kontext.options.generate import Generate
from kontext.options.merge import Merge
from kontext.options.train import Train

# Name on the command line -> module with `run(options)`, imported when the command runs, and its options.
COMMANDS: dict[str, tuple[str, type[Options]]] = {
    "cache-latents": ("kontext.commands.cache_latents", CacheLatents),
    "cache-text": ("kontext.commands.cache_text", CacheText),
    "train": ("kontext.commands.train", Train),
    "generate": ("kontext.commands.generate", Generate),
    "merge": ("kontext.commands.merge", Merge),
}
