"""Stage A: a small FLUX autoencoder, trained on the small world's pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kontext.model.autoencoder import (
    AttnBlock,
    Autoencoder,
    AutoencoderConfig,
    Downsample,
    Level,
    ResnetBlock,
    Upsample,
)
from small_world import scenes
from small_world.fit import Fit
from small_world.pictures import from_unit, to_bytes, to_unit

SCALE, SHIFT = 0.3611, 0.1159
CONFIG = AutoencoderConfig(
    in_channels=3,
    width=64,
    multipliers=(1, 1, 1, 1),
    res_blocks=1,
    latent_channels=16,
    scale=SCALE,
    shift=SHIFT,
)
BATCH = 8
RATE = 2e-3
LATENT_NOISE = 0.1
PULL = 0.02


def picture(seed: int) -> Tensor:
    """Picture number `seed` as uint8: by turns a scene before its edit, after it, and clutter."""
    if seed % 3 == 2:
        return to_bytes(scenes.clutter(seed))
    edit = scenes.edit(seed)
    return to_bytes(scenes.draw(edit.target if seed % 3 else edit.reference))


def pictures(first: int, count: int) -> Tensor:
    """(count, 3, H, W), uint8."""
    return torch.stack([picture(seed) for seed in range(first, first + count)])


CARRIER = 2.0
SIGNAL = 0.7


@torch.no_grad()
def initialise(model: Autoencoder, images: Tensor) -> None:
    """Start as a chain of plain resampling, with carriers that let colours pass the group norms.

    With 64 channels each of the 32 groups has two, and a flat picture would leave every norm as +1 and -1: its
    colour would be lost. So each odd channel carries a fixed pattern (inside against border, which zero padding
    tells apart) that dominates its group's variance; the even channel then passes the norm almost linearly, at a strength measured on `images`.
    """
    for module in model.modules():
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
        elif isinstance(module, AttnBlock):
            nn.init.zeros_(module.proj_out.weight)
        elif isinstance(module, Upsample):
            nn.init.dirac_(module.conv.weight)
        elif isinstance(module, Downsample):
            nn.init.zeros_(module.conv.weight)
            diagonal = torch.arange(len(module.conv.weight))
            module.conv.weight[diagonal, diagonal, :2, :2] = 0.25
    for half in (model.encoder, model.decoder):
        nn.init.zeros_(half.conv_in.weight[1::2])
        nn.init.zeros_(half.conv_out.weight[:, 1::2])
        _add_carriers(half.mid.block_1)
    _scale(model.encoder.conv_in, slice(0, None, 2), SIGNAL, lambda: model.encode(images))
    _scale(model.encoder.conv_out, slice(CONFIG.latent_channels), 1 / SCALE, lambda: model.encode(images))
    _scale(model.decoder.conv_in, slice(0, None, 2), SIGNAL, lambda: model.decode(model.encode(images)))
    _scale(model.decoder.conv_out, slice(3), SIGNAL, lambda: model.decode(model.encode(images)))


def _scale(conv: nn.Conv2d, rows: slice, std: float, run: Callable[[], object]) -> None:
    """Give the output channels `rows` of `conv` mean 0 and the wanted standard deviation over what `run` computes."""
    outputs = []
    hook = conv.register_forward_hook(lambda module, inputs, output: outputs.append(output[:, rows]))
    run()
    hook.remove()
    gain = std / outputs[0].std((0, 2, 3))
    conv.weight[rows] *= gain[:, None, None, None]
    conv.bias[rows] = (conv.bias[rows] - outputs[0].mean((0, 2, 3))) * gain


def _add_carriers(block: ResnetBlock) -> None:
    """Make `block` add the pattern to odd channels: a constant, summed over neighbours, is less at the border."""
    odd = torch.arange(1, len(block.conv1.weight), 2)
    constant, mean_neighbours = F.silu(torch.ones(())), 7.5
    block.norm1.weight[odd], block.norm1.bias[odd] = 0.0, 1.0
    block.conv1.weight[odd] = 0.0
    block.conv1.weight[odd, odd] = 1.0
    block.conv1.bias[odd] = -constant * mean_neighbours
    block.conv2.weight[odd, odd, 1, 1] = CARRIER


def train(
    pool: Tensor, *, steps: int, device: torch.device, checkpoint: Path, say: Callable[[str], None]
) -> Autoencoder:
    """Least absolute error through latents with a little noise, so that decoding forgives the denoiser's errors.

    A light pull keeps each channel of the scaled latents near mean 0 and variance 1, where diffusion starts.
    """

    def loss_of(model: nn.Module, step: int) -> Tensor:
        torch.manual_seed(step)
        images = to_unit(pool[torch.randint(len(pool), (BATCH,))].to(device))
        latents = model.encode(images)
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        pull = (mean**2 + (std - 1) ** 2).mean()
        decoded = model.decode(latents + LATENT_NOISE * torch.randn_like(latents))
        return F.l1_loss(decoded, images) + PULL * pull

    torch.manual_seed(0)
    model = Autoencoder(CONFIG)
    initialise(model, to_unit(pool[:64]))
    idle = [_take_blocks(level) for level in (model.encoder.down[0], model.decoder.up[0])]
    trained = Fit(model.to(device), rate=RATE, checkpoint=checkpoint).run(loss_of, steps=steps, say=say)
    for level, blocks in zip((trained.encoder.down[0], trained.decoder.up[0]), idle, strict=True):
        level.block = blocks.to(device)
    return trained


def _take_blocks(level: Level) -> nn.ModuleList:
    """Take out the blocks of full resolution, two thirds of all arithmetic: they stay the identity they begin as."""
    blocks, level.block = level.block, nn.ModuleList()
    return blocks


@torch.no_grad()
def standardise(model: Autoencoder, pool: Tensor) -> None:
    """Bring each channel of the scaled latents to variance 1 by the weights of the two outer convolutions.

    z' - shift = (z - shift) / std for the stored latents z, undone where they enter the decoder.
    """
    device = next(model.parameters()).device
    latents = torch.cat([model.encode(to_unit(part.to(device))) for part in pool.split(64)])
    std = latents.std((0, 2, 3))
    out, into = model.encoder.conv_out, model.decoder.conv_in
    out.weight[: len(std)] /= std[:, None, None, None]
    out.bias[: len(std)] = (out.bias[: len(std)] - SHIFT) / std + SHIFT
    into.bias += torch.einsum("oihw,i->o", into.weight, SHIFT * (1 - std))
    into.weight *= std[None, :, None, None]


def measure(model: Autoencoder, images: Tensor) -> float:
    """Mean absolute error of encoding and decoding, in 0..255."""
    device = next(model.parameters()).device
    with torch.no_grad():
        parts = [
            from_unit(model.decode(model.encode(to_unit(part.to(device))))).cpu() for part in images.split(64)
        ]
    return float((torch.cat(parts).int() - images.int()).abs().float().mean())
