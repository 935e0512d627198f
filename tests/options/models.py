"""A small command with an option of every kind."""

from pathlib import Path
from typing import Literal

from kontext.options.base import Options, option, required
from kontext.options.shared import Common, Precision


class Files(Options):
    """Files"""

    vae: Path | None = option("Autoencoder.", default=None, aliases=("ae",))
    dit: Path = option("Transformer.")


class Everything(Files, Common):
    """Do everything.

    In detail.
    """

    vae: Path = required(Files, "vae")
    prompt: str | None = option("Text [in brackets] | with a bar.", default=None)
    image_size: tuple[int, int] | None = option("Height and width.", default=None)
    lora_weight: list[Path] = option("Files.", default=[])
    lora_multiplier: list[float] = option("Strengths.", default=[1.0])
    attn_mode: Literal["sdpa", "flash"] = option(
        "Kernel.", default="sdpa", flags={"sdpa": "sdpa", "flash_attn": "flash"}
    )
    vae_dtype: Precision | None = option("Precision.", default=None)
    steps: int = option("Steps.", default=25, ge=1, le=100)
    rate: float = option("Rate.", default=1e-4, gt=0)
    warmup: int | float = option("Steps, or a share of them.", default=0)
    shuffle: bool = option("Shuffle.", default=True)
    no_resize: bool = option("Keep sizes.", default=False)
    fp8: bool = option("8 bits.", default=False, aliases=("fp8_base",))
