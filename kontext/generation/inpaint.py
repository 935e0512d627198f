"""Edits that keep something: a mask limits where the picture changes, strength how far it goes from the reference."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn

from kontext.data.images import Size, as_rgb, read_picture
from kontext.errors import UserError
from kontext.flow import mix, velocity
from kontext.generation.references import Opened, at_size
from kontext.generation.request import Request
from kontext.model.latents import LATENT_FACTOR
from kontext.sampler import Denoise


@dataclass(frozen=True)
class Canvas:
    """The picture that is changed: latent (1, C, h, w), and where, (1, 1, h, w) in 0..1; None is everywhere."""

    latent: Tensor
    area: Tensor | None

    def start(self, noise: Tensor, sigma: Tensor) -> Tensor:
        """x at the first noise level sigma (1,)."""
        return mix(self.latent.to(noise), noise, sigma.to(noise))

    def within(self, denoise: Denoise, noise: Tensor) -> Denoise:
        """The velocity inside the area. Outside, the one that leads from `noise` to the canvas on a straight line.

        So x outside is the canvas noised to the level of each step, whatever the sampler.
        """
        if self.area is None:
            return denoise
        area, straight = self.area.to(noise), velocity(self.latent.to(noise), noise)
        return lambda x, t: area * denoise(x, t) + (1 - area) * straight


def check_canvas(request: Request) -> None:
    """Raise UserError for a mask or a strength that has no picture to work on."""
    if not request.uses_canvas:
        return
    option = "--strength" if request.mask is None else "--mask"
    if not request.references:
        raise UserError(f"{option} needs a reference (--control-image), the picture that is changed.")
    if request.stitch and len(request.references) > 1:
        raise UserError(f"{option} changes one picture; it cannot be used with --stitch.")


def open_mask(request: Request, reference: Opened) -> Image.Image | None:
    """The mask at the reference's own size, 8-bit grey: 255 (white) where the picture changes, 0 where it stays.

    Greys are taken as black or white, then the edge is blurred by `mask_blur` pixels. Raises UserError for a mask of
    another size than the reference and for one without white.
    """
    if request.mask is None:
        return None
    by_path = isinstance(request.mask, Path)
    name = str(request.mask) if by_path else "The mask"
    picture = read_picture(request.mask) if by_path else as_rgb(request.mask)
    if picture.image.size != reference.image.size:
        sizes = [f"{image.width}x{image.height}" for image in (picture.image, reference.image)]
        raise UserError(
            f"{name}: has {sizes[0]} pixels, but {reference.name} has {sizes[1]}; make them equal."
        )
    mask = _black_or_white(picture.image.convert("L"))
    if mask.getbbox() is None:
        raise UserError(f"{name}: is black, so nothing would change; paint white what is to be edited.")
    return mask.filter(ImageFilter.GaussianBlur(request.mask_blur)) if request.mask_blur else mask


def _black_or_white(mask: Image.Image) -> Image.Image:
    return mask.point([0] * 128 + [255] * 128)


def _mask_at(mask: Image.Image, size: Size, request: Request) -> Image.Image:
    fitted = at_size(mask, size, request)
    return fitted if request.mask_blur else _black_or_white(fitted)


def latent_area(mask: Image.Image | None, size: Size, request: Request) -> Tensor | None:
    """The mask on latents (1, 1, h, w) of a picture of `size`: a cell is open as far as its most open pixel."""
    if mask is None:
        return None
    pixels = torch.from_numpy(np.array(_mask_at(mask, size, request)))
    return nn.functional.max_pool2d(pixels[None, None].float() / 255, LATENT_FACTOR)


def paste(picture: Image.Image, reference: Opened, request: Request) -> Image.Image:
    """The picture inside the mask; outside, the reference's own pixels. Without a mask: the picture."""
    mask = open_mask(request, reference)
    if mask is None:
        return picture
    if picture.size == reference.image.size:
        return Image.composite(picture, reference.image, mask)
    kept = at_size(reference.image, picture.size, request)
    return Image.composite(picture, kept, _mask_at(mask, picture.size, request))
