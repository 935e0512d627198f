"""Options of `kontext merge`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator

from kontext.options.base import Options, option, optional
from kontext.options.shared import Adapters, Common, Dit, long_precision

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


class MakingLora(Options):
    """Making a LoRA (without --dit, or with --extract)"""

    rank: int | None = option(
        "Rank of the LoRA written; its best approximation is found by SVD. Without it ranks add up, exactly.",
        default=None,
        ge=1,
        aliases=("new_rank",),
    )
    format: Literal["kohya", "diffusers", "bfl", "comfy"] = option(
        "Names in the LoRA written: kohya (musubi-tuner, sd-scripts, ComfyUI), diffusers (also PEFT), "
        "bfl (double_blocks...), comfy (diffusion_model.double_blocks...).",
        default="kohya",
    )
    extract: Path | None = option(
        "A fine-tuned transformer: write the LoRA of --rank that makes it out of --dit.", default=None
    )


class Averaging(Options):
    """Averaging the checkpoints of a run (the LoRA files, by training step)"""

    ema_beta: float | None = option(
        "Share of the average that stays at each further file: 0.9 averages over about ten.",
        default=None,
        ge=0,
        lt=1,
    )
    ema_beta2: float | None = option(
        "The share at the last file; it goes there from --ema-beta in a straight line.",
        default=None,
        ge=0,
        lt=1,
    )
    ema_sigma_rel: float | None = option(
        "Width of a power-function average, as a part of the run, instead of --ema-beta.", default=None, gt=0
    )


class Merge(Adapters, Written, MakingLora, Averaging, Common):
    """Merge LoRAs into a checkpoint, or into one LoRA."""

    dit: Path | None = optional(Dit, "dit")
    save_merged_model: Path = option(
        "File to write. For diffusers' layout a name without ending is a folder that diffusers loads.",
        aliases=("output",),
    )
