"""Packing, positions and noise against diffusers' pipeline and numbers counted by hand."""

import pytest
import torch

from kontext.model.latents import draw_noise, pack, position_ids, unpack


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import FluxKontextPipeline

    return FluxKontextPipeline


def test_order_of_tokens_and_channels():
    """2 channels of 2 x 4: two tokens, channels as (C, row, column)."""
    latents = torch.arange(16).view(1, 2, 2, 4)
    assert pack(latents).tolist() == [[[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]]


@pytest.mark.parametrize("size", [(4, 6), (6, 4), (2, 2)])
def test_packing_is_diffusers_and_reverses(pipeline, size):
    latents = torch.randn(2, 16, *size)
    assert torch.equal(pack(latents), pipeline._pack_latents(latents, 2, 16, *size))
    assert torch.equal(unpack(pack(latents), *size), latents)


def test_positions_are_diffusers(pipeline):
    expected = pipeline._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32)
    assert torch.equal(position_ids(3, 5), expected)


def test_positions_of_references():
    assert position_ids(1, 2, index=1, offset=(4, 7)).tolist() == [[1, 4, 7], [1, 4, 8]]


def test_noise_is_diffusers():
    from diffusers.utils.torch_utils import randn_tensor

    expected = randn_tensor((1, 16, 6, 8), generator=torch.Generator().manual_seed(42))
    assert torch.equal(draw_noise(42, 48, 64), expected)
    assert draw_noise(42, 48, 64).dtype == torch.float32


def test_packed_noise_is_drawn_as_tokens():
    """musubi-tuner draws (1, tokens, 64); packing ours gives its numbers back."""
    expected = torch.randn(1, 3 * 4, 64, generator=torch.Generator().manual_seed(42))
    noise = draw_noise(42, 48, 64, packed=True)
    assert noise.shape == (1, 16, 6, 8) and torch.equal(pack(noise), expected)
