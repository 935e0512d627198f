"""Stage B: a small Kontext with its two text encoders, and the edits of scenes that they learn from together.

The instruction reaches the transformer as T5's tokens and as CLIP's pooled vector, as in the real model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from kontext.model.autoencoder import Autoencoder
from kontext.model.transformer import Transformer, TransformerConfig
from small_world import scenes
from small_world.pictures import to_bytes, to_unit

T5_TOKENS = 8
CLIP_TOKENS = 12
TEXT_WIDTH = 64
CONFIG = TransformerConfig(
    in_channels=64,
    out_channels=64,
    context_width=TEXT_WIDTH,
    vector_width=TEXT_WIDTH,
    width=192,
    heads=3,
    mlp_width=768,
    double_blocks=1,
    single_blocks=5,
    axes=(8, 28, 28),
    theta=10_000.0,
    guidance=True,
)


@dataclass(frozen=True)
class Pool:
    """Encoded edits: latents (N, C, h, w) before and after, ids of instructions and of captions (text to image).

    `kinds` holds for each kind of edit the rows that belong to it.
    """

    before: Tensor
    after: Tensor
    instructions: tuple[Tensor, Tensor]
    captions: tuple[Tensor, Tensor]
    kinds: dict[str, Tensor]


class SmallWorld(nn.Module):
    """The three networks that learn together."""

    def __init__(self, t5_vocabulary: int, clip_vocabulary: int) -> None:
        super().__init__()
        self.transformer = Transformer(CONFIG)
        self.t5 = T5EncoderModel(_t5_config(t5_vocabulary))
        self.clip = CLIPTextModel(_clip_config(clip_vocabulary))
        _initialise(self.transformer)

    def text(self, ids: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """T5's tokens (B, T, D) and CLIP's pooled vector (B, V)."""
        return self.t5(input_ids=ids[0]).last_hidden_state, self.clip(input_ids=ids[1]).pooler_output


def _t5_config(vocabulary: int) -> T5Config:
    return T5Config(
        vocab_size=vocabulary,
        d_model=TEXT_WIDTH,
        d_kv=32,
        num_heads=2,
        d_ff=128,
        num_layers=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
    )


def _clip_config(vocabulary: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )


def _initialise(model: Transformer) -> None:
    """Every block begins as the identity and the model as zero (DiT's adaLN-Zero; Peebles and Xie 2022)."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    gates = [model.final_layer.linear, model.final_layer.adaLN_modulation[1], model.guidance_in.out_layer]
    for block in model.double_blocks:
        gates += [block.img_mod.lin, block.txt_mod.lin]
    gates += [block.modulation.lin for block in model.single_blocks]
    for linear in gates:
        nn.init.zeros_(linear.weight)


class Words:
    """Text to the token ids of both encoders."""

    def __init__(self, models: Path) -> None:
        self.t5 = T5TokenizerFast.from_pretrained(str(models / "tokenizer_t5"))
        self.clip = CLIPTokenizer.from_pretrained(str(models / "tokenizer_clip"))

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Ids (B, T5_TOKENS) and (B, CLIP_TOKENS). CLIP is causal: what follows its end of text changes nothing."""

        def ids(tokenizer: T5TokenizerFast | CLIPTokenizer, length: int) -> Tensor:
            settings = {
                "max_length": length,
                "padding": "max_length",
                "truncation": True,
                "return_tensors": "pt",
            }
            return tokenizer(texts, **settings).input_ids

        return ids(self.t5, T5_TOKENS), ids(self.clip, CLIP_TOKENS)


@torch.no_grad()
def encode_scenes(autoencoder: Autoencoder, drawn: list[scenes.Scene]) -> Tensor:
    """Latents (N, C, h, w) of the pictures of scenes, on the CPU."""
    device = next(autoencoder.parameters()).device
    parts = [drawn[i : i + 32] for i in range(0, len(drawn), 32)]
    pixels = (torch.stack([to_bytes(scenes.draw(scene)) for scene in part]) for part in parts)
    return torch.cat([autoencoder.encode(to_unit(part.to(device))).cpu() for part in pixels])


def make_pool(autoencoder: Autoencoder, words: Words, size: int) -> Pool:
    """The edits numbered 0 to size, encoded once."""
    edits = [scenes.edit(seed) for seed in range(size)]
    kinds = {kind: torch.tensor([i for i, e in enumerate(edits) if e.kind == kind]) for kind in scenes.EDITS}
    return Pool(
        before=encode_scenes(autoencoder, [edit.reference for edit in edits]),
        after=encode_scenes(autoencoder, [edit.target for edit in edits]),
        instructions=words([edit.instruction for edit in edits]),
        captions=words([edit.reference.caption() for edit in edits]),
        kinds=kinds,
    )
