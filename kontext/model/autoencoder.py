"""The FLUX autoencoder: images to latents of an eighth of their size and back.

B batch, C channels. Parameter names are those of Black Forest Labs' `ae.safetensors`.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kontext.model.convolution import Conv3x3, DoublingConv3x3
from kontext.model.group_norm import GroupNorm


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of a FLUX autoencoder. The published one: width 128, multipliers (1, 2, 4, 4), 2 blocks a level.

    Latents are scale * (mean - shift), of about unit variance.
    """

    in_channels: int
    width: int
    multipliers: tuple[int, ...]
    res_blocks: int
    latent_channels: int
    scale: float
    shift: float

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, from full to lowest resolution."""
        return tuple(self.width * m for m in self.multipliers)


def group_norm(channels: int) -> GroupNorm:
    return GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels)
        self.conv1 = Conv3x3(channels, out_channels)
        self.norm2 = group_norm(out_channels)
        self.conv2 = Conv3x3(out_channels, out_channels)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return h.add_(self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        return self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x


class AttnBlock(nn.Module):
    """Attention of one head over all positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.proj_out(attend(self.q(h), in_rows(self.k(h)), in_rows(self.v(h))))


def in_rows(x: Tensor) -> Tensor:
    """A map (B, C, H, W) as rows (B, 1, H W, C).

    A GPU's attention takes rows whose channels lie together; of others it makes all scores, which no memory holds for
    a large picture.
    """
    return rearrange(x, "B C H W -> B 1 (H W) C").contiguous()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one head: q (B, C, H, W) over all positions of the rows k and v."""
    out = F.scaled_dot_product_attention(in_rows(q), k, v)
    return rearrange(out, "B 1 (H W) C -> B C H W", H=q.shape[2])


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = DoublingConv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Level(nn.Module):
    """The blocks of one resolution, and the step to the next."""

    def __init__(self, channels: int, out_channels: int, blocks: int) -> None:
        super().__init__()
        widths = (channels, *[out_channels] * blocks)
        self.block = nn.ModuleList(ResnetBlock(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """(B, 3, H, W) to mean and log-variance: (B, 2 C, H/8, W/8)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = Conv3x3(config.in_channels, widths[0])
        self.down = nn.ModuleList(Level(a, b, config.res_blocks) for a, b in pairwise((widths[0], *widths)))
        for level, channels in zip(self.down[:-1], widths, strict=False):
            level.downsample = Downsample(channels)
        self.mid = Middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = Conv3x3(widths[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x)), inplace=True))


class Decoder(nn.Module):
    """(B, C, H/8, W/8) to (B, 3, H, W). Levels are numbered from full resolution, and run from the last."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = Conv3x3(config.latent_channels, widths[-1])
        self.mid = Middle(widths[-1])
        steps = pairwise((*widths, widths[-1]))
        self.up = nn.ModuleList(Level(a, b, config.res_blocks + 1) for b, a in steps)
        for level, channels in zip(self.up[1:], widths[1:], strict=True):
            level.upsample = Upsample(channels)
        self.norm_out = group_norm(widths[0])
        self.conv_out = Conv3x3(widths[0], config.in_channels)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x), inplace=True))


class Autoencoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def factor(self) -> int:
        """Pixels per latent, along each side."""
        return 2 ** (len(self.config.multipliers) - 1)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in -1..1 to scaled latents (B, C, H/8, W/8): the mean of the posterior."""
        mean, _ = torch.chunk(self.encoder(images), 2, 1)
        return self.config.scale * (mean - self.config.shift)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, H/8, W/8) to images (B, 3, H, W), about -1..1."""
        return self.decoder(latents / self.config.scale + self.config.shift)
