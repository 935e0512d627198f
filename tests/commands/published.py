"""Sizes of the models that FLUX.1 Kontext [dev] is published with."""

from functools import cache

import torch
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from kontext.commands.model_sizes import PictureModels, text_sizes
from kontext.model.autoencoder import Autoencoder
from tests.memory.test_estimate import AE


@cache
def published() -> PictureModels:
    t5 = T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    clip = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
    )
    with torch.device("meta"):
        text = text_sizes(T5EncoderModel(t5), CLIPTextModel(clip))
        numbers = sum(parameter.numel() for parameter in Autoencoder(AE).parameters())
    return PictureModels(AE, numbers, text)


MODELS = published()
