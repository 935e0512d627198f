"""The FLUX transformer: text and image tokens in two streams, then in one.

B batch, L tokens, D width, H heads. Parameter names are those of Black Forest Labs' checkpoints, so that
their files load as they are.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kontext.model.attention import rope
from kontext.model.blocks import DoubleStreamBlock, SingleStreamBlock
from kontext.model.elementwise import modulate

TIME_CHANNELS = 256
TIME_FACTOR = 1000.0


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a FLUX transformer."""

    in_channels: int
    out_channels: int
    context_width: int
    vector_width: int
    width: int
    heads: int
    mlp_width: int
    double_blocks: int
    single_blocks: int
    axes: tuple[int, int, int]
    theta: float
    guidance: bool


FLUX = TransformerConfig(
    in_channels=64,
    out_channels=64,
    context_width=4096,
    vector_width=768,
    width=3072,
    heads=24,
    mlp_width=12288,
    double_blocks=19,
    single_blocks=38,
    axes=(16, 56, 56),
    theta=10_000.0,
    guidance=True,
)
"""FLUX.1 Kontext [dev], of 11.9 billion parameters."""


def sinusoid(t: Tensor, channels: int = TIME_CHANNELS) -> Tensor:
    """Features of t (B,) in 0..1: (B, channels), cosines first, float32 (as in DDPM, t scaled by 1000)."""
    half = channels // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(10000.0) * steps / half)
    angle = TIME_FACTOR * t.float()[:, None] * frequencies
    return torch.cat((angle.cos(), angle.sin()), -1)


class Embedder(nn.Module):
    """Two linears with SiLU between, from features to the model's width."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(channels, width)
        self.out_layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class FinalLayer(nn.Module):
    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, -1)
        return self.linear(modulate(x, shift, scale))


@dataclass(frozen=True)
class Modulations:
    """The conditioning vector (B, D) and what each block makes of it (B, 1, parts*D)."""

    vec: Tensor
    blocks: tuple[Tensor, ...]


class Transformer(nn.Module):
    """Velocity of the image tokens, given text, reference tokens and the noise level."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.img_in = nn.Linear(config.in_channels, width)
        self.time_in = Embedder(TIME_CHANNELS, width)
        self.vector_in = Embedder(config.vector_width, width)
        if config.guidance:
            self.guidance_in = Embedder(TIME_CHANNELS, width)
        self.txt_in = nn.Linear(config.context_width, width)
        sizes = width, config.heads, config.mlp_width
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(*sizes) for _ in range(config.double_blocks))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(*sizes) for _ in range(config.single_blocks))
        self.final_layer = FinalLayer(width, config.out_channels)

    def condition(self, t: Tensor, vector: Tensor, guidance: Tensor | None) -> Tensor:
        """The vector (B, D) that modulates every block: noise level, guidance strength and pooled text."""
        vec = self.time_in(sinusoid(t).to(vector.dtype))
        if self.config.guidance:
            assert guidance is not None
            vec = vec + self.guidance_in(sinusoid(guidance).to(vector.dtype))
        return vec + self.vector_in(vector)

    def modulations(self, vecs: Sequence[Tensor]) -> list[Modulations]:
        """What depends on the conditioning vector alone, for each of several (B, D): block by block.

        So weights that wait elsewhere come over once for all of them.
        """
        by_block = [block.modulation(vecs) for block in self.blocks()]
        return [Modulations(vec, tuple(mods)) for vec, *mods in zip(vecs, *by_block, strict=True)]

    def blocks(self) -> Iterator[nn.Module]:
        yield from self.double_blocks
        yield from self.single_blocks

    def positions(self, txt_ids: Tensor, img_ids: Tensor) -> Tensor:
        """The rotation of every token, text first, for ids (B or 1, T or L, 3)."""
        return rope(torch.cat((txt_ids, img_ids), 1), self.config.axes, self.config.theta)

    def trunk(
        self, img: Tensor, txt: Tensor, pe: Tensor, mods: Modulations, *, targets: int | None = None
    ) -> Tensor:
        """Velocity of the first `targets` image tokens, from embedded img (B, L, D) and txt (B, T, D)."""
        img, txt = self.first(img, txt, pe, mods)
        return self.final_layer(self.rest(img, txt, pe, mods, targets=targets), mods.vec)

    def first(self, img: Tensor, txt: Tensor, pe: Tensor, mods: Modulations) -> tuple[Tensor, Tensor]:
        """Both streams after the first block."""
        return self.double_blocks[0](img, txt, mods.blocks[0], pe)

    def rest(
        self, img: Tensor, txt: Tensor, pe: Tensor, mods: Modulations, *, targets: int | None = None
    ) -> Tensor:
        """The first `targets` image tokens (B, targets, D) after all other blocks; the last computes only these."""
        double, single = mods.blocks[: len(self.double_blocks)], mods.blocks[len(self.double_blocks) :]
        for block, mod in zip(tuple(self.double_blocks)[1:], double[1:], strict=True):
            img, txt = block(img, txt, mod, pe)
        x = torch.cat((txt, img), 1)
        *inner, last = self.single_blocks
        for block, mod in zip(inner, single[:-1], strict=True):
            x = block(x, mod, pe)
        return last(x, single[-1], pe, wanted=(txt.shape[1], targets or img.shape[1]))

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        t: Tensor,
        vector: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Velocity (B, L, out_channels) of image tokens (B, L, in_channels), target before reference.

        txt (B, T, context_width); img_ids, txt_ids (B or 1, L or T, 3) positions; t (B,) noise level in 0..1;
        vector (B, vector_width) pooled text; guidance (B,) for models with a guidance embedding.
        """
        pe = self.positions(txt_ids, img_ids)
        (mods,) = self.modulations([self.condition(t, vector, guidance)])
        return self.trunk(self.img_in(img), self.txt_in(txt), pe, mods)
