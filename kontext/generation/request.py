"""What a person asks for: one picture, described by values."""

import random
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from kontext.lora.strength import Multiplier

Reference = Path | Image.Image


@dataclass(frozen=True)
class Request:
    """One picture to make. Sizes in pixels; a size of None follows the first reference.

    References are stretched to Kontext's nearest size (`crop_references`: scaled and cropped), or only cropped to
    multiples of 16 pixels if not `resize_references`; `stitch` makes one wide reference of them, `placement` is
    "offset" or "index". `restore_size` returns the picture at the first reference's own size. `mask` (white: edit)
    limits the edit of the first reference, its edge blurred by `mask_blur` pixels; `strength` under 1 starts from the
    first reference, noised that far.

    `noise_layout` is that in which the noise of a seed is drawn: "latent" (diffusers, ComfyUI) or "packed" (musubi).
    `flow_shift` None means the schedule's own; that of "flux" depends on the resolution. `multipliers` None means the
    adapters' own. `negative_prompt` counts only with a `true_cfg_scale` over 1.
    """

    prompt: str
    references: tuple[Reference, ...] = ()
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    steps: int = 25
    guidance: float = 2.5
    flow_shift: float | None = None
    sampler: str = "euler"
    schedule: str = "flux"
    negative_prompt: str | None = None
    true_cfg_scale: float = 1.0
    resize_references: bool = True
    crop_references: bool = False
    stitch: bool = False
    placement: str = "offset"
    restore_size: bool = False
    mask: Reference | None = None
    mask_blur: float = 0.0
    strength: float = 1.0
    multipliers: tuple[Multiplier, ...] | None = None
    noise_layout: str = "latent"

    @property
    def uses_negative(self) -> bool:
        """Whether a second pass with the negative prompt is needed (the rule is diffusers')."""
        return self.negative_prompt is not None and self.true_cfg_scale > 1

    @property
    def uses_canvas(self) -> bool:
        """Whether the first reference is also the picture that is changed."""
        return self.mask is not None or self.strength < 1

    @property
    def skipped_steps(self) -> int:
        """Steps left out at the beginning because of `strength` (the rule is diffusers'); one step at least is done."""
        return min(int(self.steps - self.steps * self.strength), self.steps - 1)

    def seeded(self) -> "Request":
        """The same request with a seed: a random one of 32 bits where none was given."""
        return self if self.seed is not None else replace(self, seed=random.SystemRandom().getrandbits(32))

    def copies(self, count: int) -> list["Request"]:
        """`count` requests with seeds counted up from this one's."""
        if count == 1:
            return [self]
        first = self.seeded()
        assert first.seed is not None
        return [replace(first, seed=first.seed + number) for number in range(count)]
