"""Sizes read from headers, against the bytes of models that were loaded."""

import pytest
import torch
from torch import nn

from kontext.checkpoints import load_autoencoder, load_clip, load_t5, load_transformer
from kontext.commands.model_sizes import picture_models, text_of, transformer_weights, vae_of
from kontext.memory.placement import Placement
from kontext.options.generate import Generate
from tests.commands.published import MODELS


def nbytes(*models: nn.Module) -> int:
    return sum(t.nbytes for model in models for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_encoders(tiny_files, dtype, fp8):
    options = Generate(
        vae=tiny_files.vae, text_encoder1=tiny_files.t5, text_encoder2=tiny_files.clip, fp8_t5=fp8
    )
    t5 = load_t5(tiny_files.t5, device="cpu", dtype=dtype, fp8=fp8)
    clip = load_clip(tiny_files.clip, device="cpu", dtype=dtype)
    assert text_of(options, picture_models(options).text, dtype).weights == nbytes(t5, clip)


def test_the_autoencoder(tiny_files):
    options = Generate(
        vae=tiny_files.vae, text_encoder1=tiny_files.t5, text_encoder2=tiny_files.clip, vae_dtype="bfloat16"
    )
    loaded = load_autoencoder(tiny_files.vae, device="cpu", dtype=torch.bfloat16)
    assert vae_of(options, picture_models(options)).weights == nbytes(loaded)


@pytest.mark.parametrize("mode", [None, "fp8", "fp8_scaled", "int8", "nf4"])
def test_the_transformer(tiny_files, mode):
    loaded = load_transformer(tiny_files.dit, device="cpu", dtype=torch.bfloat16, quantization=mode)
    weights = transformer_weights(loaded.config, itemsize=2, mode=mode)
    assert weights.placed(Placement()).device == nbytes(loaded)


def test_the_published_text_encoders():
    """T5-XXL's encoder has 4.76 thousand million parameters, CLIP-L's text model 123 million."""
    text = text_of(Generate(), MODELS.text, torch.bfloat16)
    assert text.weights == 2 * (4_762_310_656 + 123_060_480)
