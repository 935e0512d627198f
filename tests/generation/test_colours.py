"""Looks at latents: close to what the decoder makes of them, for the autoencoder that is loaded."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from kontext.checkpoints import load_autoencoder
from kontext.data.images import to_image
from kontext.generation.colours import Colours, fit_colours
from kontext.model.autoencoder import Autoencoder

TRAINED = Path(__file__).parents[2] / "examples" / "small_world" / "models" / "ae.safetensors"


@pytest.fixture(scope="module")
def autoencoder():
    return load_autoencoder(TRAINED, device=torch.device("cpu"), dtype=torch.float32)


def test_a_look_is_close_to_the_decoded_picture(autoencoder):
    """A picture that is unlike the sheet: shapes with edges on grey."""
    pixels = torch.full((1, 3, 64, 96), 0.2)
    pixels[:, 0, 8:40, 16:40], pixels[:, 1:, 30:56, 50:90] = 0.9, -0.8
    latent = autoencoder.encode(pixels)
    look = fit_colours(autoencoder).picture(latent, 8)
    decoded = to_image(autoencoder.decode(latent)[0])
    assert look.size == decoded.size == (96, 64)
    small = [np.float64(image.resize((12, 8), Image.Resampling.BOX)).ravel() for image in (look, decoded)]
    assert np.corrcoef(*small)[0, 1] > 0.9
    assert np.abs(small[0] - small[1]).mean() < 25


class Linear(Autoencoder):
    """Latents of three channels that are the colours of their cells, turned and moved."""

    turn, move = torch.tensor([[0.0, 2, 0], [0, 0, 3], [-1, 0, 0]]), torch.tensor([0.5, 0, -1])

    def encode(self, images):
        cells = F.avg_pool2d(images, 8)
        return torch.einsum("rc,bchw->brhw", self.turn, cells) + self.move[:, None, None]

    def decode(self, latents):
        cells = torch.einsum("cr,brhw->bchw", self.turn.inverse(), latents - self.move[:, None, None])
        return F.interpolate(cells, scale_factor=8)


def test_a_linear_autoencoder_is_found_exactly(autoencoder):
    config = replace(autoencoder.config, latent_channels=3)
    colours = fit_colours(Linear(config))
    torch.testing.assert_close(colours.weight, Linear.turn.inverse(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(colours.bias, -Linear.turn.inverse() @ Linear.move, atol=1e-5, rtol=1e-5)


def test_colours_are_clamped_and_scaled_up():
    colours = Colours(torch.eye(3), torch.tensor([0.0, 0.0, -2.0]))
    look = colours.picture(torch.ones(1, 3, 2, 3), 8)
    assert look.size == (24, 16) and look.getpixel((5, 5)) == (255, 255, 0)
