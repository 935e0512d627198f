"""Options of `kontext cache-latents` and `kontext cache-text`."""

from pathlib import Path
from typing import Literal

from kontext.options.base import Options, option
from kontext.options.shared import Common, DatasetFile, Encoders, Vae


class Caching(Options):
    """Caching"""

    skip_existing: bool = option(
        "Keep what is up to date: same picture, caption, sizes, weights and settings. "
        "--no-skip-existing encodes everything again.",
        default=True,
    )
    keep_cache: bool = option("Keep the cache files of items that are no longer listed.", default=False)


class Looking(Options):
    """Looking at the dataset"""

    debug_mode: Literal["image", "console"] | None = option(
        "Encode nothing; show targets, references and captions as they will be used: "
        "image writes a contact sheet (PNG), console prints a table.",
        default=None,
    )
    debug_output: Path = option("File of the contact sheet.", default=Path("contact_sheet.png"))
    debug_items: int = option("Items to show at most.", default=32, ge=1, aliases=("console_num_images",))


class CacheLatents(Caching, Looking, DatasetFile, Vae, Common):
    """Encode the pictures of a dataset, so that training need not."""

    batch_size: int = option("Pictures that are encoded together.", default=1, ge=1)
    num_workers: int | None = option(
        "Processes that read and resize pictures; 0 for none. By default as many as there are processors, less one, "
        "and 8 at most.",
        default=None,
        ge=0,
    )


class CacheText(Caching, DatasetFile, Encoders, Common):
    """Encode the captions of a dataset, so that training need not."""

    batch_size: int = option("Captions that are encoded together.", default=16, ge=1)
