"""Prompts to what conditions the transformer: T5's hidden states, token by token, and CLIP's pooled one.

B texts, T tokens, D width of T5, V width of CLIP.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kontext.errors import UserError
from kontext.model.clip import ClipText
from kontext.model.t5 import T5Encoder


@torch.no_grad()
def encode_t5(model: T5Encoder, tokenizer: Any, texts: Sequence[str], *, max_length: int = 512) -> Tensor:
    """(B, T, D): texts are cut or padded to `max_length` tokens. Padding is attended to, as FLUX learned it.

    Raises UserError when the tokenizer belongs to another model.
    """
    ids = _token_ids(model, tokenizer, texts, max_length)
    return model(ids)


@torch.no_grad()
def encode_clip(model: ClipText, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """(B, V): the last hidden state, normed, at the first end-of-text token.

    Raises UserError when the tokenizer belongs to another model.
    """
    ids = _token_ids(model, tokenizer, texts, model.config.length)
    hidden = model(ids)
    end = (ids == tokenizer.eos_token_id).int().argmax(-1)
    return hidden[torch.arange(len(ids), device=ids.device), end]


def _token_ids(model: T5Encoder | ClipText, tokenizer: Any, texts: Sequence[str], length: int) -> Tensor:
    """(B, length), on the model's device."""
    options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
    ids = tokenizer(list(texts), **options).input_ids
    if ids.max() >= model.config.vocab_size:
        raise UserError(
            f"The tokenizer gives token {ids.max()}, but the text encoder knows "
            f"{model.config.vocab_size}: they do not belong together. Give the right tokenizer's folder."
        )
    return ids.to(next(model.parameters()).device)
