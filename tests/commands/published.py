"""Sizes of the models that FLUX.1 Kontext [dev] is published with."""

from functools import cache

import torch

from kontext.commands.model_sizes import PictureModels, text_sizes
from kontext.model.autoencoder import Autoencoder
from kontext.model.clip import ClipConfig, ClipText
from kontext.model.t5 import T5_XXL, T5Encoder
from tests.memory.test_estimate import AE

CLIP_L = ClipConfig(
    vocab_size=49408,
    width=768,
    mlp_width=3072,
    layers=12,
    heads=12,
    length=77,
    activation="quick_gelu",
    eps=1e-5,
)


@cache
def published() -> PictureModels:
    with torch.device("meta"):
        text = text_sizes(T5Encoder(T5_XXL), ClipText(CLIP_L))
        numbers = sum(parameter.numel() for parameter in Autoencoder(AE).parameters())
    return PictureModels(AE, numbers, text)


MODELS = published()
