"""The autoencoder's interface. Its numbers are compared with diffusers' in tests/checkpoints."""

import torch
from safetensors.torch import load_file

from kontext.checkpoints import load_autoencoder
from kontext.model.autoencoder import Autoencoder, AutoencoderConfig
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
