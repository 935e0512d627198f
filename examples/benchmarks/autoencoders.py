"""The same random weights in our autoencoder and in diffusers'."""

import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from kontext.checkpoints import load_autoencoder
from kontext.model.autoencoder import Autoencoder


def autoencoder_pair(*, width: int) -> tuple[Autoencoder, AutoencoderKL]:
    """A FLUX autoencoder with levels of 1, 2, 4 and 4 times `width`: ours and diffusers'."""
    torch.manual_seed(0)
    theirs = diffusers_autoencoder(width)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}, file)
        return load_autoencoder(file, device="cpu", dtype=torch.float32), theirs


def diffusers_autoencoder(width: int) -> AutoencoderKL:
    """diffusers', with random weights."""
    return AutoencoderKL(
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        layers_per_block=2,
        latent_channels=16,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
