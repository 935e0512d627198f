"""Loss masks: how much each part of a target counts in training.

A mask is a picture of the target's size, white where the target counts and black where it does not; or it is the
target's own alpha channel, opaque where it counts. Greys count in part.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops
from torch import Tensor, nn

from kontext.data.images import Picture, Size, as_rgb, cover, explained, read_upright
from kontext.errors import UserError
from kontext.model.latents import LATENT_FACTOR


@dataclass(frozen=True)
class Layers:
    """A picture taken apart: its colours, whatever its alpha says, and its alpha in 8-bit grey, if it has one."""

    picture: Picture
    alpha: Image.Image | None


def read_layers(path: Path, data: bytes | None = None) -> Layers:
    """Decode a picture file without laying its transparent parts on white. Raises UserError as `read_picture`."""
    image = read_upright(path, data)
    with explained(path):
        if image.mode.startswith("I") or not image.has_transparency_data:
            return Layers(as_rgb(image), None)
        layers = image.convert("RGBA")
        return Layers(as_rgb(layers.convert("RGB")), layers.getchannel("A"))


def read_mask(path: Path, data: bytes | None = None) -> Image.Image:
    """A mask file in 8-bit grey; what is transparent in it does not count."""
    layers = read_layers(path, data)
    grey = layers.picture.image.convert("L")
    return grey if layers.alpha is None else ImageChops.multiply(grey, layers.alpha)


def latent_weights(mask: Image.Image, size: Size, name: Path) -> Tensor:
    """Weights (1, h, w) in 0..1 of the latents of a target that is brought to `size`, as its pixels are.

    A latent's weight is the mean over its 8x8 pixels. Raises UserError, by `name`, when nothing is left.
    """
    fitted = cover(
        mask, size, Image.Resampling.BILINEAR
    )  # Lanczos would leave ripples in the black beside an edge
    pixels = torch.from_numpy(np.array(fitted)).float() / 255
    weights = nn.functional.avg_pool2d(pixels[None], LATENT_FACTOR)
    if not weights.any():
        raise UserError(
            f"{name}: this loss mask is black (or transparent) all over what is trained on, so there would be nothing "
            "to learn. Paint white what counts, or take the item out."
        )
    return weights


def check_size(mask: Path, size: Size, target: Path, wanted: Size) -> None:
    """Raise UserError unless a mask is as large as its target, both upright."""
    if size != wanted:
        raise UserError(
            f"{mask}: this loss mask has {size[0]}x{size[1]} pixels, but its target {target} has "
            f"{wanted[0]}x{wanted[1]}; make them equal."
        )


def match_masks(images: Sequence[Path], folder: Path, files: Iterable[Path]) -> dict[Path, Path]:
    """The mask of each target: the picture in `folder`, of which these are the files, with the target's stem.

    Raises UserError for a target without a mask and for one with several.
    """
    found: dict[str, list[Path]] = {}
    for path in files:
        found.setdefault(path.stem, []).append(path)
    for image in images:
        masks = found.get(image.stem, [])
        if not masks:
            raise UserError(
                f"{folder}: no loss mask for {image.name}. Add {folder / image.stem}.png; targets without a mask "
                "belong into a block without mask_directory."
            )
        if len(masks) > 1:
            raise UserError(f"{folder}: {' and '.join(p.name for p in masks)}: keep one for {image.name}.")
    return {image: found[image.stem][0] for image in images}
