"""Options of `kontext merge`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator

from kontext.options.base import Options, option, optional
from kontext.options.generate import Loras
from kontext.options.shared import Common, Dit, long_precision

SavePrecision = Annotated[
    Literal["float32", "bfloat16", "float16", "fp8_scaled"], BeforeValidator(long_precision)
]


class Written(Options):
    """Output"""

    save_dtype: SavePrecision | None = option(
        "Precision of the weights written; without it, that of the base. "
        "fp8_scaled is ComfyUI's 8-bit layout with one scale per weight.",
        default=None,
        aliases=("save_precision",),
    )
    layout: Literal["bfl", "diffusers"] | None = option(
        "Names of the weights written: Black Forest Labs' (ComfyUI, musubi-tuner, kontext) or diffusers'; "
        "without it, those of the base.",
        default=None,
    )


class Merge(Loras, Written, Common):
    """Merge LoRAs into a checkpoint."""

    dit: Path | None = optional(Dit, "dit")
    save_merged_model: Path = option(
        "File to write. For diffusers' layout a name without ending is a folder that diffusers loads.",
        aliases=("output",),
    )
