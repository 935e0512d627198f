"""Loading an autoencoder: every layout must compute what diffusers computes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from kontext.checkpoints import load_autoencoder
from kontext.errors import UserError
from tests import tiny
from tests.compare import relative_error

CPU = {"device": "cpu", "dtype": torch.float32}


@pytest.fixture(scope="module")
def reference(tiny_files):
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(tiny_files.pipeline / "vae")


@pytest.mark.parametrize("layout", ["vae", "vae_diffusers", "pipeline"])
@torch.no_grad()
def test_every_layout_agrees_with_diffusers(tiny_files, reference, layout):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 48, 32, generator=generator) * 2 - 1
    mean = reference.encode(images).latent_dist.mode()
    latents = tiny.AE_SCALE * (mean - tiny.AE_SHIFT)
    model = load_autoencoder(getattr(tiny_files, layout), **CPU)
    assert model.factor == 8
    assert relative_error(model.encode(images), latents) < 1e-5
    pictures = reference.decode(latents / tiny.AE_SCALE + tiny.AE_SHIFT).sample
    assert relative_error(model.decode(latents), pictures) < 1e-5


def test_scale_and_shift_come_from_config_json(tiny_files, tmp_path):
    shutil.copytree(tiny_files.pipeline / "vae", tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    changed = {**config, "scaling_factor": 0.5, "shift_factor": 0.0}
    (tmp_path / "vae" / "config.json").write_text(json.dumps(changed))
    model = load_autoencoder(tmp_path / "vae", **CPU)
    assert (model.config.scale, model.config.shift) == (0.5, 0.0)


def test_without_config_they_are_those_of_flux(tiny_files):
    config = load_autoencoder(tiny_files.vae, **CPU).config
    assert (config.scale, config.shift, config.multipliers) == (0.3611, 0.1159, (1, 2, 2, 2))


def test_faults_are_listed(tiny_files, tmp_path):
    state = load_file(tiny_files.vae)
    del state["decoder.up.2.upsample.conv.bias"]
    state["loss.logvar"] = torch.zeros(1)
    save_file(state, tmp_path / "ae.safetensors")
    with pytest.raises(
        UserError, match=r"1 missing: decoder.up.2.upsample.conv.bias; 1 unknown: loss.logvar"
    ):
        load_autoencoder(tmp_path / "ae.safetensors", **CPU)
