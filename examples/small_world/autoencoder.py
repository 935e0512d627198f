"""Stage A: a small FLUX autoencoder, trained on the small world's pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kontext.model.autoencoder import (
    AttnBlock,
    Autoencoder,
    AutoencoderConfig,
    Encoder,
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
BATCH = 4
RATE = 1e-3
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
    """Start with an encoder that takes principal components, and a decoder that enlarges them.

    All blocks begin as the identity. Carriers let colours pass the group norms: with 64 channels each of the 32
    groups has two, and a flat picture would leave every norm as +1 and -1, its colour lost. So each odd channel
    gets a fixed pattern (inside against border, which zero padding tells apart) that dominates its group's
    variance; the even channel then passes almost linearly.
    """
    for module in model.modules():
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
        elif isinstance(module, AttnBlock):
            nn.init.zeros_(module.proj_out.weight)
        elif isinstance(module, Upsample):
            nn.init.dirac_(module.conv.weight)
    for half in (model.encoder, model.decoder):
        _add_carriers(half.mid.block_1)
    _take_components(model.encoder, images)
    nn.init.zeros_(model.decoder.conv_in.weight[1::2])
    nn.init.zeros_(model.decoder.conv_out.weight[:, 1::2])
    _scale(model.encoder.conv_out, slice(CONFIG.latent_channels), 1 / SCALE, lambda: model.encode(images))
    _scale(model.decoder.conv_in, slice(0, None, 2), SIGNAL, lambda: model.decode(model.encode(images)))
    _scale(model.decoder.conv_out, slice(3), SIGNAL, lambda: model.decode(model.encode(images)))


def _take_components(encoder: Encoder, images: Tensor) -> None:
    """Gather each 8 by 8 patch into channels (3, 12, 48), then project it: even channels hold the components.

    They come twice, with both signs, because silu(x) - silu(-x) = x.
    """
    patches = F.unfold(images, 8, stride=8).transpose(1, 2).reshape(-1, 3 * 64)
    _, values, vectors = torch.linalg.svd(patches - patches.mean(0), full_matrices=False)
    count = CONFIG.latent_channels
    components = vectors[:count] * SIGNAL * (len(patches) ** 0.5 / values[:count, None])
    for conv in (encoder.conv_in, *(level.downsample.conv for level in encoder.down[:-1]), encoder.conv_out):
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
    encoder.conv_in.weight[range(3), range(3), 1, 1] = 1.0
    for level, channels in zip(encoder.down[:2], (3, 12), strict=True):
        for corner in range(4):
            rows = range(corner * channels, (corner + 1) * channels)
            level.downsample.conv.weight[rows, range(channels), corner // 2, corner % 2] = 1.0
    # A patch's pixel is (y2 y1 y0, x2 x1 x0) in binary; bit 0 was gathered first, bit 2 is this step's.
    order = "k (c y2 y1 y0 x2 x1 x0) -> k (y1 x1 y0 x0 c) y2 x2"
    taps = rearrange(components, order, c=3, y2=2, y1=2, y0=2, x2=2, x1=2, x0=2)
    last = encoder.down[2].downsample.conv.weight
    last[0 : 2 * count : 2, :48, :2, :2] = taps
    last[2 * count : 4 * count : 2, :48, :2, :2] = -taps
    rows = torch.arange(count)
    encoder.conv_out.weight[rows, 2 * rows, 1, 1] = 1.0
    encoder.conv_out.weight[rows, 2 * (rows + count), 1, 1] = -1.0


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
    return _fit(model.to(device), loss_of, steps=steps, checkpoint=checkpoint, say=say)


def refine(
    model: Autoencoder, pool: Tensor, *, steps: int, checkpoint: Path, say: Callable[[str], None]
) -> Autoencoder:
    """Train the decoder alone: the latents stay as they are, so that the transformer may learn them meanwhile."""
    device = next(model.parameters()).device
    model.decoder.requires_grad_(True)

    def loss_of(model: nn.Module, step: int) -> Tensor:
        torch.manual_seed(step)
        images = to_unit(pool[torch.randint(len(pool), (BATCH,))].to(device))
        latents = model.encode(images)
        return F.l1_loss(model.decode(latents + LATENT_NOISE * torch.randn_like(latents)), images)

    return _fit(model, loss_of, steps=steps, checkpoint=checkpoint, say=say)


def _fit(
    model: Autoencoder,
    loss_of: Callable[[nn.Module, int], Tensor],
    *,
    steps: int,
    checkpoint: Path,
    say: Callable[[str], None],
) -> Autoencoder:
    """Train without the blocks of full resolution: two thirds of all arithmetic, they stay the identity they are."""
    blocks = [_take_blocks(level) for level in (model.encoder.down[0], model.decoder.up[0])]
    trained = Fit(model, rate=RATE, checkpoint=checkpoint).run(loss_of, steps=steps, say=say)
    for level, taken in zip((trained.encoder.down[0], trained.decoder.up[0]), blocks, strict=True):
        level.block = taken
    return trained.requires_grad_(False)


def _take_blocks(level: Level) -> nn.ModuleList:
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
