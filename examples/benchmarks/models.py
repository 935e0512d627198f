"""The same random weights in our classes and in diffusers'."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from kontext.checkpoints import load_autoencoder, load_transformer
from kontext.model.autoencoder import Autoencoder
from kontext.model.latents import position_ids
from kontext.model.transformer import Transformer


def transformer_pair(
    *, width: int, heads: int, double: int, single: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Transformer, FluxTransformer2DModel]:
    """A FLUX transformer with 128-channel heads, text width 512 and pooled width 256: ours and diffusers'."""
    torch.manual_seed(0)
    theirs = FluxTransformer2DModel(
        in_channels=64,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=width // heads,
        num_attention_heads=heads,
        joint_attention_dim=512,
        pooled_projection_dim=256,
        guidance_embeds=True,
    )
    theirs = theirs.to(device, dtype).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        file = saved(theirs, Path(folder))
        return load_transformer(file, device=device, dtype=dtype), theirs


def autoencoder_pair(*, width: int) -> tuple[Autoencoder, AutoencoderKL]:
    """A FLUX autoencoder with levels of 1, 2, 4 and 4 times `width`: ours and diffusers'."""
    torch.manual_seed(0)
    theirs = diffusers_autoencoder(width)
    with tempfile.TemporaryDirectory() as folder:
        file = saved(theirs, Path(folder))
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


def saved(model: nn.Module, folder: Path) -> Path:
    file = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, file)
    return file


@dataclass(frozen=True)
class Inputs:
    """One picture's tokens: `target` and `reference` squares of tokens, 512 of text."""

    img: Tensor
    img_ids: Tensor
    txt: Tensor
    txt_ids: Tensor
    t: Tensor
    vector: Tensor
    guidance: Tensor

    @classmethod
    def random(cls, *, side: int, dtype: torch.dtype, text: int = 512, device: str = "cpu") -> "Inputs":
        torch.manual_seed(1)
        ids = torch.cat((position_ids(side, side), position_ids(side, side, index=1)))
        return cls(
            torch.randn(1, len(ids), 64).to(device, dtype),
            ids.to(device),
            torch.randn(1, text, 512).to(device, dtype),
            torch.zeros(text, 3, device=device),
            torch.tensor([0.7], device=device),
            torch.randn(1, 256).to(device, dtype),
            torch.tensor([2.5], device=device),
        )

    @property
    def tokens(self) -> int:
        return self.img.shape[1] + self.txt.shape[1]

    def ours(self, model: nn.Module) -> Tensor:
        ids, txt_ids = self.img_ids[None], self.txt_ids[None]
        return model(self.img, ids, self.txt, txt_ids, self.t, self.vector, self.guidance)

    def theirs(self, model: nn.Module) -> Tensor:
        return model(
            hidden_states=self.img,
            encoder_hidden_states=self.txt,
            pooled_projections=self.vector,
            timestep=self.t,
            img_ids=self.img_ids,
            txt_ids=self.txt_ids,
            guidance=self.guidance,
            return_dict=False,
        )[0]
