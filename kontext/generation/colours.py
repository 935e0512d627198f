"""A cheap look at latents: the colours that are nearest to those of the autoencoder's decoder and linear in the latent."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from kontext.data.images import to_image
from kontext.model.autoencoder import Autoencoder

SHEET = 128  # pixels along a side of the picture that the colours are learned from
CELLS = (2, 4, 8, 16, 32)  # of its layers of squares, along a side


@dataclass(frozen=True)
class Colours:
    """Colours in -1..1 of a latent's cell: weight (3, C) times its channels, plus bias (3,)."""

    weight: Tensor
    bias: Tensor

    def picture(self, latent: Tensor, scale: int) -> Image.Image:
        """The look of a latent (1, C, h, w), smoothly scaled up."""
        pixels = F.conv2d(latent.float().cpu(), self.weight[:, :, None, None], self.bias)
        small = to_image(pixels[0])
        return small.resize((scale * small.width, scale * small.height), Image.Resampling.BICUBIC)


@torch.no_grad()
def fit_colours(autoencoder: Autoencoder) -> Colours:
    """Least squares between latents and what they decode to, averaged by cell, of a sheet of random colours.

    So it serves any autoencoder, and costs one small picture's encoding and decoding.
    """
    like = next(autoencoder.parameters())
    latents = autoencoder.encode(colour_sheet().to(like))
    cells = F.avg_pool2d(autoencoder.decode(latents).clamp(-1, 1), autoencoder.factor)
    given, wanted = (x[0].flatten(1).T.double().cpu() for x in (latents, cells))
    given = torch.cat((given, torch.ones(len(given), 1)), 1)
    solution = torch.linalg.lstsq(given, wanted).solution.float()
    return Colours(solution[:-1].T.contiguous(), solution[-1])


def colour_sheet() -> Tensor:
    """Squares of random colours at all scales (1, 3, SHEET, SHEET) in -1..1, always the same."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(1, 3, SHEET, SHEET)
    for cells in CELLS:
        field = torch.randn(1, 3, cells, cells, generator=generator)
        total += F.interpolate(field, size=(SHEET, SHEET), mode="nearest") / cells**0.5
    return torch.tanh(total / total.std())
