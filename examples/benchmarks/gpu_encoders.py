"""Rows of the GPU benchmark about the encoders: the autoencoder and T5 as caching uses them."""

from collections.abc import Iterator
from dataclasses import replace

import torch
import transformers
from autoencoders import autoencoder_pair
from bench import Bench, Line
from card import clear, peak
from diffusers import AutoencoderKL
from gpu_speed import compared
from paired import Paired, paired, relative_error
from torch import Tensor
from transformers import T5EncoderModel

from kontext.model.autoencoder import Autoencoder
from kontext.model.t5 import T5_XXL, T5Config, T5Encoder

TINY = replace(T5_XXL, vocab_size=500, width=64, mlp_width=128, blocks=2, heads=2, head_width=32)
CAPTIONS = 16


@torch.no_grad()
def encoders(bench: Bench) -> Iterator[Line]:
    """G12, without decoding files: the autoencoder, in both precisions, and T5."""
    edge, width = (64, 32) if bench.quick else (1024, 128)
    images = torch.rand(1, 3, edge, edge, device=bench.device) * 2 - 1
    mine, peer = (model.to(bench.device) for model in autoencoder_pair(width=width))
    encoding = []
    for dtype in (torch.float32,) if bench.quick else (torch.float32, torch.bfloat16):
        name = f"{edge}x{edge}, {str(dtype).removeprefix('torch.')}, against diffusers' default float32"
        encode, *lines = _autoencoder(bench, mine.to(dtype), peer, images, name)
        yield from lines
        encoding.append(min(encode.ours))
    del mine, peer
    text, line = _text(bench)
    yield line
    pairs = 1 / (2 * min(encoding) + min(text.ours) / CAPTIONS)
    yield Line("G12", "pairs with caption a second, of the encoders alone", pairs, "1/s", aim="12 to 20")


def _autoencoder(
    bench: Bench, mine: Autoencoder, peer: AutoencoderKL, images: Tensor, name: str
) -> tuple[Paired, Line, Line]:
    """Times of encoding, and the lines of encoding and decoding."""
    inputs, config = images.to(next(mine.parameters()).dtype), mine.config

    def encoded() -> Tensor:
        return config.scale * (peer.encode(images).latent_dist.mean - config.shift)

    def decoded() -> Tensor:
        return peer.decode(latents.float() / config.scale + config.shift).sample

    latents, lines = mine.encode(inputs), []
    runs = {
        "encode": (lambda: mine.encode(inputs), encoded),
        "decode": (lambda: mine.decode(latents), decoded),
    }
    results = []
    for what, (ours, theirs) in runs.items():
        note = f"differs by {relative_error(ours(), theirs()):.1e}"
        results.append(paired(ours, theirs, rounds=bench.rounds))
        most = peak(ours, bench.device)
        lines.append(compared("G12", f"autoencoder, {what} {name}", results[-1], None, "", most, note))
    return results[0], *lines


def _text(bench: Bench) -> tuple[Paired, Line]:
    """T5 on captions of full length, ours and that of transformers, which share random weights."""
    config = TINY if bench.quick else T5_XXL
    clear(bench.device)
    theirs = _their_t5(config, bench)
    with torch.device("meta"):
        mine = T5Encoder(config)
    state = {**theirs.state_dict(), "shared.weight": theirs.encoder.embed_tokens.weight}
    mine.load_state_dict({name: state[name] for name in mine.state_dict()}, strict=True, assign=True)
    mine.eval()
    length = 16 if bench.quick else 512
    ids = torch.randint(0, config.vocab_size, (CAPTIONS, length), device=bench.device)

    def peer() -> Tensor:
        return theirs(input_ids=ids).last_hidden_state

    error = relative_error(mine(ids), peer())
    result = paired(lambda: mine(ids), peer, rounds=bench.rounds)
    name = f"T5-XXL, {CAPTIONS} captions of {length} tokens, against transformers"
    return result, compared("G12", name, result, None, "", note=f"differs by {error:.1e}")


def _their_t5(config: T5Config, bench: Bench) -> T5EncoderModel:
    sizes = transformers.T5Config(
        vocab_size=config.vocab_size,
        d_model=config.width,
        d_kv=config.head_width,
        d_ff=config.mlp_width,
        num_layers=config.blocks,
        num_heads=config.heads,
        relative_attention_num_buckets=config.buckets,
        relative_attention_max_distance=config.furthest,
        layer_norm_epsilon=config.eps,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        model = T5EncoderModel(sizes).to(bench.dtype)
    model = model.to_empty(device=bench.device).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    return model
