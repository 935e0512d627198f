"""Between latents and tokens: packing, positions and the initial noise.

B batch, C latent channels, h and w the latent's height and width (an eighth of the pixels).
"""

import torch
from einops import rearrange
from torch import Tensor

PATCH = 2
LATENT_FACTOR = 8
PIXELS_PER_TOKEN = PATCH * LATENT_FACTOR


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) to tokens (B, h/2 * w/2, 4 C), in raster order, channels as (C, row, column)."""
    return rearrange(latents, "B C (h p) (w q) -> B (h w) (C p q)", p=PATCH, q=PATCH)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens (B, h/2 * w/2, 4 C) to latents (B, C, h, w) of latent size `height` x `width`."""
    rows, columns = height // PATCH, width // PATCH
    return rearrange(tokens, "B (h w) (C p q) -> B C (h p) (w q)", h=rows, w=columns, p=PATCH, q=PATCH)


def position_ids(
    height: int,
    width: int,
    *,
    index: int = 0,
    offset: tuple[int, int] = (0, 0),
    device: torch.device | None = None,
) -> Tensor:
    """Positions (height * width, 3) of a grid of tokens: (index, row, column), float32.

    `index` is 0 for the target and 1 for a reference; `offset` (rows, columns) moves the grid. Made on `device`: a copy
    to a GPU would wait for all that it has to do.
    """
    rows = torch.arange(height, dtype=torch.float32, device=device) + offset[0]
    columns = torch.arange(width, dtype=torch.float32, device=device) + offset[1]
    axis = torch.full((1,), float(index), device=device)
    return torch.stack(torch.meshgrid(axis, rows, columns, indexing="ij"), -1).reshape(-1, 3)


def draw_noise(seed: int, height: int, width: int, channels: int = 16, *, packed: bool = False) -> Tensor:
    """Initial noise (1, C, height/8, width/8) for a picture of `height` x `width` pixels.

    Drawn in float32 on the CPU before packing, so that a seed means the same as in diffusers and ComfyUI, on
    every device; or `packed`, as tokens, where it means what it does in musubi-tuner.
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = height // LATENT_FACTOR, width // LATENT_FACTOR
    if not packed:
        return torch.randn(1, channels, height, width, generator=generator)
    tokens = (height // PATCH) * (width // PATCH)
    return unpack(torch.randn(1, tokens, channels * PATCH**2, generator=generator), height, width)
