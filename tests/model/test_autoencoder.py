"""The autoencoder's interface. Small ones of each layout are compared with diffusers' in tests/checkpoints."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from kontext.checkpoints import load_autoencoder
from kontext.model import autoencoder
from kontext.model.autoencoder import Autoencoder, AutoencoderConfig, attend, in_rows
from tests.compare import relative_error


def test_parameter_names_are_the_checkpoints(tiny_files):
    model = load_autoencoder(tiny_files.vae, device="cpu", dtype=torch.float32)
    assert set(model.state_dict()) == set(load_file(tiny_files.vae))


def test_parameters_of_the_published_model():
    """ae.safetensors: 83,819,683 parameters."""
    with torch.device("meta"):
        model = Autoencoder(AutoencoderConfig(3, 128, (1, 2, 4, 4), 2, 16, 0.3611, 0.1159))
    assert sum(p.numel() for p in model.parameters()) == 83_819_683
    assert model.factor == 8


@torch.no_grad()
def test_shapes_and_batches(tiny_files):
    model = load_autoencoder(tiny_files.vae, device="cpu", dtype=torch.float32)
    images = torch.rand(2, 3, 16, 40) * 2 - 1
    latents = model.encode(images)
    assert latents.shape == (2, 16, 2, 5)
    assert model.decode(latents).shape == images.shape
    assert relative_error(model.encode(images[1:]), latents[1:]) < 1e-5


@torch.no_grad()
def test_encoding_is_deterministic(tiny_files):
    """The mean of the posterior, not a sample."""
    model = load_autoencoder(tiny_files.vae, device="cpu", dtype=torch.float32)
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(model.encode(images), model.encode(images))


@pytest.mark.parametrize(("height", "width"), [(64, 48), (72, 88)])
@torch.no_grad()
def test_levels_of_many_channels_agree_with_diffusers(tmp_path, height, width):
    """Those with fewer products, on maps of which not all heights are fours of rows. Compared in float64."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    theirs = AutoencoderKL(
        block_out_channels=(64, 128),
        latent_channels=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    save_file(theirs.state_dict(), tmp_path / "vae.safetensors")
    ours = load_autoencoder(tmp_path / "vae.safetensors", device="cpu", dtype=torch.float32)
    images = torch.rand(1, 3, height, width) * 2 - 1
    exact = theirs.double().encode(images.double()).latent_dist.mean
    found = ours.encode(images) / ours.config.scale + ours.config.shift
    assert relative_error(found, exact) < 1e-5
    assert relative_error(ours.decode(ours.encode(images)), theirs.decode(found.double()).sample) < 1e-5


def test_attention_is_given_channels_that_lie_together(monkeypatch):
    """As the fused kernels of a GPU ask for: without one of them all scores of a picture would be in memory."""
    plain, given = torch.nn.functional.scaled_dot_product_attention, []

    def watched(*rows):
        given.extend(rows)
        return plain(*rows)

    monkeypatch.setattr(autoencoder.F, "scaled_dot_product_attention", watched)
    q, k, v = (torch.randn(1, 8, height, 5) for height in (2, 3, 3))  # as a GPU's group norm lays them out
    out = attend(q, in_rows(k), in_rows(v))
    assert [rows.stride(-1) for rows in given] == [1, 1, 1]
    scores = torch.einsum("bchw,bcij->bhwij", q, k).flatten(3) / 8**0.5
    expected = torch.einsum("bhwn,bcn->bchw", scores.softmax(-1), v.flatten(2))
    torch.testing.assert_close(out, expected)
