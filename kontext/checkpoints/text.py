"""T5 and CLIP from a ComfyUI single file or a Hugging Face folder."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from kontext.checkpoints.reading import Origin, check, count, fill, stacked_shape, tell_of_fp8
from kontext.checkpoints.source import Source, open_source
from kontext.errors import UserError
from kontext.model.clip import ACTIVATIONS, ClipConfig, ClipText
from kontext.model.t5 import T5Config, T5Encoder
from kontext.quant import keep_in

_T5_EXTRA = r"decoder\.|lm_head\.|spiece_model$|tokenizer_json$|encoder\.embed_tokens\.|shared\."
_CLIP_EXTRA = (
    r"(text_model\.)?embeddings\.position_ids$|text_projection|vision_model\.|visual_projection|logit_scale"
)
_T5_BLOCK = "encoder.block.0.layer"
_CLIP_HEAD = 64  # channels of an attention head, in all CLIP text models


def load_t5(
    path: Path | str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    kept: torch.dtype | None = None,
    fp8: bool = False,
) -> T5Encoder:
    """Load T5's encoder, frozen and in evaluation mode; a decoder beside it is left out.

    kept: of the linears' weights, if not `dtype`, which they are computed with in.
    fp8: the linears keep 8 bits a weight: whole numbers with scales, for 8-bit floats make the embeddings
    differ by 4 to 8 % from full precision, whole numbers by 1 to 2 %. Files in fp8 stay as they are.
    In float16 the second half of each MLP stays in float32: it overflows.

    Raises UserError when the file is not a complete T5 v1.1 encoder.
    """
    source = open_source(path, "T5")
    model, origins = _empty_t5(source)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    narrow = keep_in(model, linears, kept) if kept not in (None, dtype) else set()

    def dtype_of(name: str) -> torch.dtype:
        if name in narrow:
            return kept
        return torch.float32 if dtype == torch.float16 and ".wo." in name else dtype

    if not fp8:
        tell_of_fp8(source, kept or dtype, "--fp8-t5")
    mode = "int8" if fp8 else None
    fill(model, source, origins, device=device, dtype=dtype_of, select=linears.__contains__, mode=mode)
    return model


def empty_t5(path: Path | str) -> T5Encoder:
    """T5's encoder on the meta device: complete, but for its numbers. Raises UserError as loading does."""
    return _empty_t5(open_source(path, "T5"))[0]


def _empty_t5(source: Source) -> tuple[T5Encoder, dict[str, Origin]]:
    """The model, and where its tensors are in the file, which has all of them."""
    with torch.device("meta"):
        model = T5Encoder(_t5_config(source))
    origins = {name: Origin((name,)) for name in model.state_dict()}
    origins["shared.weight"] = Origin((_t5_embedding(source),))
    check(source, model, origins, _T5_EXTRA)
    return model, origins


def _t5_embedding(source: Source) -> str:
    return "shared.weight" if "shared.weight" in source else "encoder.embed_tokens.weight"


def _t5_config(source: Source) -> T5Config:
    """From shapes; what they do not tell from config.json, else as published."""

    def shape(name: str) -> tuple[int, ...]:
        return stacked_shape(source, Origin((name,)))

    vocabulary, width = shape(_t5_embedding(source))
    buckets, heads = shape(f"{_T5_BLOCK}.0.SelfAttention.relative_attention_bias.weight")
    return T5Config(
        vocab_size=vocabulary,
        width=width,
        mlp_width=shape(f"{_T5_BLOCK}.1.DenseReluDense.wi_0.weight")[0],
        blocks=count(source.keys(), "encoder.block"),
        heads=heads,
        head_width=shape(f"{_T5_BLOCK}.0.SelfAttention.q.weight")[0] // heads,
        buckets=buckets,
        furthest=_setting(source, "relative_attention_max_distance", 128),
        eps=_setting(source, "layer_norm_epsilon", 1e-6),
    )


def load_clip(path: Path | str, *, device: torch.device | str, dtype: torch.dtype) -> ClipText:
    """Load CLIP's text model, frozen and in evaluation mode; an image model beside it is left out.

    Raises UserError when the file is not a complete CLIP text model.
    """
    source = open_source(path, "CLIP")
    model, origins = _empty_clip(source)
    fill(model, source, origins, device=device, dtype=lambda _: dtype)
    return model


def empty_clip(path: Path | str) -> ClipText:
    """CLIP's text model on the meta device: complete, but for its numbers. Raises UserError as loading does."""
    return _empty_clip(open_source(path, "CLIP"))[0]


def _empty_clip(source: Source) -> tuple[ClipText, dict[str, Origin]]:
    """The model, and where its tensors are in the file, which has all of them."""
    with torch.device("meta"):
        model = ClipText(_clip_config(source))
    prefix = _clip_prefix(source)
    origins = {name: Origin((prefix + name,)) for name in model.state_dict()}
    check(source, model, origins, _CLIP_EXTRA)
    return model, origins


def _clip_prefix(source: Source) -> str:
    return "text_model." if "text_model.embeddings.token_embedding.weight" in source else ""


def _clip_config(source: Source) -> ClipConfig:
    """From shapes; what they do not tell from config.json, else that of OpenAI's models.

    Raises UserError for an activation that no published text model has.
    """
    prefix = _clip_prefix(source)

    def shape(name: str) -> tuple[int, ...]:
        return stacked_shape(source, Origin((prefix + name,)))

    vocabulary, width = shape("embeddings.token_embedding.weight")
    activation = _setting(source, "hidden_act", "quick_gelu")
    if activation not in ACTIVATIONS:
        raise UserError(f"{source.path}: hidden_act {activation} in config.json is not known.")
    return ClipConfig(
        vocab_size=vocabulary,
        width=width,
        mlp_width=shape("encoder.layers.0.mlp.fc1.weight")[0],
        layers=count(source.keys(), f"{prefix}encoder.layers"),
        heads=_setting(source, "num_attention_heads", max(1, width // _CLIP_HEAD)),
        length=shape("embeddings.position_embedding.weight")[0],
        activation=activation,
        eps=_setting(source, "layer_norm_eps", 1e-5),
    )


def _setting(source: Source, name: str, default: Any) -> Any:
    """A value of config.json, where whole CLIP models keep those of their text model in a table of its own."""
    settings = source.config or {}
    return settings.get("text_config", settings).get(name, default)
