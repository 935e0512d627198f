"""The blocks of the FLUX transformer: text and image tokens in two streams, or in one.

B batch, L tokens, D width, H heads. A block receives its modulation (shift, scale, gate) instead of computing it:
it depends on the timestep alone, not on the tokens.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kontext.model.attention import Attend, attention, sdpa
from kontext.model.elementwise import gated, join, modulate, residual, split_heads, turned
from kontext.model.gelu import beside, gelu
from kontext.model.outputs import some_outputs
from kontext.model.remade import last, product, projection

Span = tuple[int, int]
"""The first of some tokens that follow each other, and their number."""


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
        return last(narrow, activate(product(widen, x)))


class DoubleStreamBlock(nn.Module):
    """Image and text each with their own weights, joined in attention."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.img_mod = Modulation(width, 6)
        self.img_attn = SelfAttention(width, heads)
        self.img_mlp = MLP(width, mlp_width)
        self.txt_mod = Modulation(width, 6)
        self.txt_attn = SelfAttention(width, heads)
        self.txt_mlp = MLP(width, mlp_width)
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

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.linear1 = nn.Linear(width, 3 * width + mlp_width)
        self.linear2 = nn.Linear(width + mlp_width, width)
        self.norm = QKNorm(width // heads)
        self.modulation = Modulation(width, 3)
        self.attend: Attend = sdpa

    def forward(self, x: Tensor, mod: Tensor, pe: Tensor, *, wanted: Span | None = None) -> Tensor:
        """x (B, L, D), mod (B, 1, 3 D). The result is of the `wanted` tokens alone, which attend to all."""
        shift, scale, gate = mod.chunk(3, -1)
        seen = None
        if wanted is not None:
            x, others = apart(x, wanted, 1)
            pe, others_pe = apart(pe, wanted, 2)
            seen = self.keys_and_values(modulate(others, shift, scale), others_pe)
        out, hidden = self.attention(modulate(x, shift, scale), pe, seen)
        return gated(x, gate, last(self.linear2, beside(out, hidden)))

    def attention(self, x: Tensor, pe: Tensor, seen: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Over x and what is `seen` beside it, and what the MLP goes on with.

        Queries and keys are gone when the MLP needs memory.
        """
        q, k, v, hidden = split_heads(product(self.linear1, x), self.heads, self.width)
        q, k = self.norm(q, k, pe)
        if seen is not None:
            k, v = map(join, seen, (k, v))
        return attention(q, k, v, self.attend), hidden

    def keys_and_values(self, x: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        """Of tokens that are attended to, and themselves go no further."""
        rows = slice(self.width, 3 * self.width)
        k, v, _ = split_heads(product(some_outputs, self.linear1, x, rows), self.heads, self.width, 2)
        return turned(k, self.norm.key_norm.scale, pe), v


def apart(x: Tensor, wanted: Span, axis: int) -> tuple[Tensor, Tensor]:
    """The `wanted` tokens, which lie along `axis`, and all others."""
    start, length = wanted
    before, inside, after = x.split((start, length, x.shape[axis] - start - length), axis)
    return inside, join(before, after, axis)
