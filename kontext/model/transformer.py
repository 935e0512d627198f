"""The FLUX transformer: text and image tokens in two streams, then in one.

B batch, L tokens, D width, H heads. Parameter names are those of Black Forest Labs' checkpoints, so that
their files load as they are. A block receives its modulation (shift, scale, gate) instead of computing it:
it depends on the timestep alone, not on the tokens.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kontext.model.attention import Attend, attention, rope, sdpa
from kontext.model.elementwise import beside, gated, gelu, join, modulate, residual, split_heads, turned
from kontext.model.remade import product, projection

Span = tuple[int, int]
"""The first of some tokens that follow each other, and their number."""

TIME_CHANNELS = 256
TIME_FACTOR = 1000.0


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a FLUX transformer. FLUX.1 Kontext [dev] has width 3072, 24 heads, 19 + 38 blocks."""

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


class RMSNorm(nn.Module):
    """The scale (D,) of an RMS norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))


class QKNorm(nn.Module):
    """RMS norms of queries and keys, per head, and their rotation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(channels)
        self.key_norm = RMSNorm(channels)

    def forward(self, q: Tensor, k: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        return turned(q, self.query_norm.scale, pe), turned(k, self.key_norm.scale, pe)


class Modulation(nn.Module):
    """`parts` vectors of the model's width from each of several conditioning vectors."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.lin = nn.Linear(width, parts * width)

    def forward(self, vecs: Sequence[Tensor]) -> list[Tensor]:
        """Each (B, D) to (B, 1, parts*D)."""
        return modulations(self.lin, vecs)


def modulations(linear: Callable[[Tensor], Tensor], vecs: Sequence[Tensor]) -> list[Tensor]:
    """SiLU and a linear map of each (B, D): (B, 1, D').

    One after the other: so those computed ahead together have the digits of those computed in their turn.
    """
    return [linear(F.silu(vec))[:, None] for vec in vecs]


Heads = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values, each (B, H, L, D/H)."""


def joint_attention(txt: Heads, img: Heads, attend: Attend) -> Tensor:
    """Of text and image over each other, text first: (B, T + L, D)."""
    q, k, v = map(join, txt, img)
    return attention(q, k, v, attend)


class SelfAttention(nn.Module):
    """The projections of one stream; the attention itself runs over both."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = QKNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def project(self, x: Tensor, pe: Tensor) -> Heads:
        """Queries and keys, normed and rotated, and values: each (B, H, L, D/H)."""
        q, k, v, _ = split_heads(product(self.qkv, x), self.heads, x.shape[-1])
        return *self.norm(q, k, pe), v


class GELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return gelu(x)


class MLP(nn.Sequential):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        widen, activate, narrow = self
        return narrow(activate(product(widen, x)))


class DoubleStreamBlock(nn.Module):
    """Image and text each with their own weights, joined in attention."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, heads = config.width, config.heads
        self.img_mod = Modulation(width, 6)
        self.img_attn = SelfAttention(width, heads)
        self.img_mlp = MLP(width, config.mlp_width)
        self.txt_mod = Modulation(width, 6)
        self.txt_attn = SelfAttention(width, heads)
        self.txt_mlp = MLP(width, config.mlp_width)
        self.attend: Attend = sdpa

    def modulation(self, vecs: Sequence[Tensor]) -> list[Tensor]:
        """Each (B, D) to (B, 1, 12 D): the image's six vectors, then the text's."""
        return [torch.cat(both, -1) for both in zip(self.img_mod(vecs), self.txt_mod(vecs), strict=True)]

    def forward(self, img: Tensor, txt: Tensor, mod: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        """img (B, L, D), txt (B, T, D), mod (B, 1, 12 D), pe over T + L positions."""
        img_mod, txt_mod = mod.chunk(2, -1)
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = img_mod.chunk(6, -1)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = txt_mod.chunk(6, -1)

        lengths = txt.shape[1], img.shape[1]
        txt_pe, img_pe = pe.split(lengths, 2)
        out = joint_attention(
            self.txt_attn.project(modulate(txt, txt_shift1, txt_scale1), txt_pe),
            self.img_attn.project(modulate(img, img_shift1, img_scale1), img_pe),
            self.attend,
        )
        txt_out, img_out = out.split(lengths, 1)

        img = projection(residual, img, img_gate1, self.img_attn.proj, img_out)
        img = gated(img, img_gate2, self.img_mlp(modulate(img, img_shift2, img_scale2)))

        txt = projection(residual, txt, txt_gate1, self.txt_attn.proj, txt_out)
        txt = gated(txt, txt_gate2, self.txt_mlp(modulate(txt, txt_shift2, txt_scale2)))
        return img, txt


class SingleStreamBlock(nn.Module):
    """Attention and MLP side by side over all tokens (as in ViT-22B)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.mlp_width
        self.heads, self.width = config.heads, width
        self.linear1 = nn.Linear(width, 3 * width + hidden)
        self.linear2 = nn.Linear(width + hidden, width)
        self.norm = QKNorm(width // config.heads)
        self.modulation = Modulation(width, 3)
        self.attend: Attend = sdpa

    def forward(self, x: Tensor, mod: Tensor, pe: Tensor, *, wanted: Span | None = None) -> Tensor:
        """x (B, L, D), mod (B, 1, 3 D). The result is of the `wanted` tokens alone, which attend to all."""
        shift, scale, gate = mod.chunk(3, -1)
        out, hidden = self.attention(product(self.linear1, modulate(x, shift, scale)), pe, wanted)
        if wanted is not None:
            x, hidden = x.narrow(1, *wanted), hidden.narrow(1, *wanted)
        return gated(x, gate, self.linear2(beside(out, hidden)))

    def attention(self, x: Tensor, pe: Tensor, wanted: Span | None) -> tuple[Tensor, Tensor]:
        """Of the wanted tokens over all, and what the MLP goes on with, from what `linear1` made.

        Queries and keys are gone when the MLP needs memory.
        """
        q, k, v, hidden = split_heads(x, self.heads, self.width)
        q, k = self.norm(q, k, pe)
        return attention(q if wanted is None else q.narrow(2, *wanted), k, v, self.attend), hidden


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
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(config) for _ in range(config.double_blocks))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(config) for _ in range(config.single_blocks))
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
