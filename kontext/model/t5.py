"""T5 v1.1's encoder (Raffel et al. 2020, arXiv:1910.10683; gated GELU of Shazeer 2020, arXiv:2002.05202).

B texts, T tokens, D width, H heads. Parameter names are those of Google's checkpoints. Text encoders are written out
here because importing them from transformers takes longer than importing torch.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kontext.model.embedding import Embedding
from kontext.model.gelu import gelu


@dataclass(frozen=True)
class T5Config:
    """Sizes. buckets: of the distance between two tokens; from `furthest` on all distances share the last one."""

    vocab_size: int
    width: int
    mlp_width: int
    blocks: int
    heads: int
    head_width: int
    buckets: int
    furthest: int
    eps: float


T5_XXL = T5Config(
    vocab_size=32128,
    width=4096,
    mlp_width=10240,
    blocks=24,
    heads=64,
    head_width=64,
    buckets=32,
    furthest=128,
    eps=1e-6,
)


class RMSNorm(nn.Module):
    """In float32, rounded to the dtype of its weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(self.weight.dtype)


class SelfAttention(nn.Module):
    """Attention without scaling, with a bias by distance. The first block's bias serves all."""

    def __init__(self, config: T5Config, *, first: bool) -> None:
        super().__init__()
        inner = config.heads * config.head_width
        self.heads = config.heads
        self.q = nn.Linear(config.width, inner, bias=False)
        self.k = nn.Linear(config.width, inner, bias=False)
        self.v = nn.Linear(config.width, inner, bias=False)
        self.o = nn.Linear(inner, config.width, bias=False)
        if first:
            self.relative_attention_bias = Embedding(config.buckets, config.heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (rearrange(f(x), "B T (H D) -> B H T D", H=self.heads) for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(rearrange(out, "B H T D -> B T (H D)"))


class GatedMLP(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.width, config.mlp_width, bias=False)
        self.wi_1 = nn.Linear(config.width, config.mlp_width, bias=False)
        self.wo = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = gelu(self.wi_0(x)) * self.wi_1(x)
        # In float16 `wo` stays in float32: its output overflows.
        return self.wo(x.to(self.wo.weight.dtype) if isinstance(self.wo, nn.Linear) else x)


class AttentionLayer(nn.Module):
    def __init__(self, config: T5Config, *, first: bool) -> None:
        super().__init__()
        self.SelfAttention = SelfAttention(config, first=first)
        self.layer_norm = RMSNorm(config.width, config.eps)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class MLPLayer(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = GatedMLP(config)
        self.layer_norm = RMSNorm(config.width, config.eps)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class Block(nn.Module):
    def __init__(self, config: T5Config, *, first: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList((AttentionLayer(config, first=first), MLPLayer(config)))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attention, mlp = self.layer
        return mlp(attention(x, bias))


class Encoder(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.block = nn.ModuleList(Block(config, first=i == 0) for i in range(config.blocks))
        self.final_layer_norm = RMSNorm(config.width, config.eps)


class T5Encoder(nn.Module):
    """Token ids (B, T) to hidden states (B, T, D). Every token attends to every other, padding too."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = Embedding(config.vocab_size, config.width)
        self.encoder = Encoder(config)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.shared(ids)
        bias = self.bias(ids.shape[1])
        for block in self.encoder.block:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)

    def bias(self, length: int) -> Tensor:
        """What is added to the scores (1, H, T, T)."""
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        buckets = distance_buckets(length, self.config.buckets, self.config.furthest)
        biases = rearrange(table(buckets.to(table.weight.device)), "T U H -> 1 H T U")
        return biases.contiguous()  # else a GPU's attention makes all scores at once


def distance_buckets(length: int, buckets: int, furthest: int) -> Tensor:
    """The bucket of every query (row) and key (column): (T, T).

    Half of the buckets are for keys behind the query. Of each half, the first half is for single distances; those
    further away are on a logarithmic scale up to `furthest`.
    """
    places = torch.arange(length)
    offset = places[None] - places[:, None]
    half, distance = buckets // 2, offset.abs()
    single = half // 2
    far = torch.log(distance.clamp(min=1) / single) / math.log(furthest / single) * (half - single)
    bucket = torch.where(distance < single, distance, (single + far.long()).clamp(max=half - 1))
    return bucket + half * (offset > 0)
