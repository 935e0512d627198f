"""Between PIL pictures and tensors, and what the measurements share."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

EDITED = 8


def to_bytes(image: Image.Image) -> Tensor:
    """RGB picture to uint8 (3, H, W)."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 0..255 to float -1..1."""
    return pixels.float() / 127.5 - 1


def from_unit(images: Tensor) -> Tensor:
    """Float (..., 3, H, W) about -1..1 to uint8, rounded."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_image(pixels: Tensor) -> Image.Image:
    """uint8 (3, H, W) to an RGB picture."""
    height, width = pixels.shape[1:]
    return Image.frombytes(
        "RGB", (width, height), bytes(pixels.permute(1, 2, 0).contiguous().flatten().tolist())
    )


def edit_error(reference: Tensor, target: Tensor, result: Tensor) -> float:
    """Mean absolute error in 0..255 of `result` against `target`, over the pixels that the edit changes.

    All three uint8 (3, H, W). A pixel counts as changed when a channel differs by more than EDITED.
    """
    changed = (reference.int() - target.int()).abs().amax(0) > EDITED
    error = (result.int() - target.int()).abs().float().mean(0)
    return float(error[changed].mean()) if changed.any() else 0.0
