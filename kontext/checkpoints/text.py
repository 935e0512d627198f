"""T5 and CLIP from a ComfyUI single file or a Hugging Face folder, into transformers' classes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kontext.checkpoints.reading import Origin, check, count, fill, stacked_shape
from kontext.checkpoints.source import Source, open_source

if TYPE_CHECKING:
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

_T5_EXTRA = r"decoder\.|lm_head\.|spiece_model$|tokenizer_json$|encoder\.embed_tokens\.|shared\."
_CLIP_EXTRA = (
    r"(text_model\.)?embeddings\.position_ids$|text_projection|vision_model\.|visual_projection|logit_scale"
)
_T5_BLOCK = "encoder.block.0.layer"
_CLIP_HEAD = 64  # channels of an attention head, in all CLIP text models
# transformers' mark for "pool at the highest id", which is <|endoftext|> in CLIP's vocabulary of any size
_POOL_HIGHEST = 2


class Unasked(nn.Module):
    """A linear without a `weight`: T5 in transformers casts the input of `wo` to its weight's dtype."""

    weight = None

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def load_t5(
    path: Path | str, *, device: torch.device | str, dtype: torch.dtype, fp8: bool = False
) -> T5EncoderModel:
    """Load T5's encoder, frozen and in evaluation mode; a decoder beside it is left out.

    fp8: the linears keep 8 bits a weight: whole numbers with scales, for 8-bit floats make the embeddings
    differ by 4 to 8 % from full precision, whole numbers by 1 to 2 %. Files in fp8 stay as they are.
    In float16 the second half of each MLP stays in float32, as in transformers itself: it overflows.

    Raises UserError when the file is not a complete T5 v1.1 encoder.
    """
    source = open_source(path, "T5")
    model, origins = _empty_t5(source)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}

    def dtype_of(name: str) -> torch.dtype:
        return torch.float32 if dtype == torch.float16 and ".wo." in name else dtype

    mode = "int8" if fp8 else None
    fill(model, source, origins, device=device, dtype=dtype_of, select=linears.__contains__, mode=mode)
    model.encoder.embed_tokens.weight = model.shared.weight
    if fp8:
        for block in model.encoder.block:
            block.layer[1].DenseReluDense.wo = Unasked(block.layer[1].DenseReluDense.wo)
    return model


def empty_t5(path: Path | str) -> T5EncoderModel:
    """T5's encoder on the meta device: complete, but for its numbers. Raises UserError as loading does."""
    return _empty_t5(open_source(path, "T5"))[0]


def _empty_t5(source: Source) -> tuple[T5EncoderModel, dict[str, Origin]]:
    """The model, and where its tensors are in the file, which has all of them."""
    from transformers import T5EncoderModel

    with torch.device("meta"):
        model = T5EncoderModel(_t5_config(source))
    embedding = Origin((_t5_embedding(source),))
    origins = {
        name: embedding if name in ("shared.weight", "encoder.embed_tokens.weight") else Origin((name,))
        for name in model.state_dict()
    }
    check(source, model, origins, _T5_EXTRA)
    return model, origins


def _t5_embedding(source: Source) -> str:
    return "shared.weight" if "shared.weight" in source else "encoder.embed_tokens.weight"


def _t5_config(source: Source) -> T5Config:
    """From config.json, or from shapes: a gated GELU, and buckets of relative distance up to 128."""
    from transformers import T5Config

    if source.config:
        return T5Config.from_dict(source.config)

    def shape(name: str) -> tuple[int, ...]:
        return stacked_shape(source, Origin((name,)))

    vocabulary, width = shape(_t5_embedding(source))
    buckets, heads = shape(f"{_T5_BLOCK}.0.SelfAttention.relative_attention_bias.weight")
    return T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=shape(f"{_T5_BLOCK}.0.SelfAttention.q.weight")[0] // heads,
        d_ff=shape(f"{_T5_BLOCK}.1.DenseReluDense.wi_0.weight")[0],
        num_layers=count(source.keys(), "encoder.block"),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=128,
        feed_forward_proj="gated-gelu",
    )


def load_clip(path: Path | str, *, device: torch.device | str, dtype: torch.dtype) -> CLIPTextModel:
    """Load CLIP's text model, frozen and in evaluation mode; an image model beside it is left out.

    Raises UserError when the file is not a complete CLIP text model.
    """
    source = open_source(path, "CLIP")
    model, origins = _empty_clip(source)
    fill(model, source, origins, device=device, dtype=lambda _: dtype)
    for module in model.modules():  # a buffer outside checkpoints, still on the meta device
        if "position_ids" in dict(module.named_buffers(recurse=False)):
            module.position_ids = torch.arange(module.position_ids.shape[-1], device=device)[None]
    return model


def empty_clip(path: Path | str) -> CLIPTextModel:
    """CLIP's text model on the meta device: complete, but for its numbers. Raises UserError as loading does."""
    return _empty_clip(open_source(path, "CLIP"))[0]


def _empty_clip(source: Source) -> tuple[CLIPTextModel, dict[str, Origin]]:
    """The model, and where its tensors are in the file, which has all of them."""
    from transformers import CLIPTextModel

    with torch.device("meta"):
        model = CLIPTextModel(_clip_config(source))
    prefix = _clip_prefix(source)
    origins = {name: Origin((prefix + name.removeprefix("text_model."),)) for name in model.state_dict()}
    check(source, model, origins, _CLIP_EXTRA)
    return model, origins


def _clip_prefix(source: Source) -> str:
    return "text_model." if "text_model.embeddings.token_embedding.weight" in source else ""


def _clip_config(source: Source) -> CLIPTextConfig:
    """From config.json, or from shapes, with the activation of OpenAI's models."""
    from transformers import CLIPTextConfig

    if source.config:
        return CLIPTextConfig.from_dict(source.config)
    prefix = _clip_prefix(source)

    def shape(name: str) -> tuple[int, ...]:
        return stacked_shape(source, Origin((prefix + name,)))

    vocabulary, width = shape("embeddings.token_embedding.weight")
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=shape("encoder.layers.0.mlp.fc1.weight")[0],
        num_hidden_layers=count(source.keys(), f"{prefix}encoder.layers"),
        num_attention_heads=max(1, width // _CLIP_HEAD),
        max_position_embeddings=shape("embeddings.position_embedding.weight")[0],
        hidden_act="quick_gelu",
        bos_token_id=vocabulary - 2,
        eos_token_id=_POOL_HIGHEST,
    )
