"""Sizes read from headers, against the bytes of models that were loaded."""

import pytest
import torch
from torch import nn

from kontext.checkpoints import load_autoencoder, load_clip, load_t5, load_transformer
from kontext.commands.model_sizes import picture_models, text_of, transformer_weights, vae_of
from kontext.device import Precision
from kontext.memory.placement import Placement
from kontext.model.transformer import FLUX
from kontext.options.generate import Generate
from tests.commands.published import MODELS


def nbytes(*models: nn.Module) -> int:
    return sum(t.nbytes for model in models for t in (*model.parameters(), *model.buffers()))


CPU = torch.device("cpu")
BFLOAT16 = Precision(torch.bfloat16, torch.bfloat16)
PRECISIONS = [Precision(torch.float32, torch.float32), Precision(torch.float32, torch.bfloat16), BFLOAT16]


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_text_encoders(tiny_files, precision, fp8):
    options = Generate(
        vae=tiny_files.vae, text_encoder1=tiny_files.t5, text_encoder2=tiny_files.clip, fp8_t5=fp8
    )
    t5 = load_t5(tiny_files.t5, device="cpu", dtype=precision.computing, kept=precision.kept, fp8=fp8)
    clip = load_clip(tiny_files.clip, device="cpu", dtype=precision.computing)
    assert text_of(options, picture_models(options).text, precision).weights == nbytes(t5, clip)


@pytest.mark.parametrize("fast", [False, True])
def test_the_autoencoder(tiny_files, monkeypatch, fast):
    monkeypatch.setattr("kontext.device.is_fast", lambda dtype: fast)
    options = Generate(
        vae=tiny_files.vae, text_encoder1=tiny_files.t5, text_encoder2=tiny_files.clip, vae_dtype="bfloat16"
    )
    loaded = load_autoencoder(tiny_files.vae, device="cpu", dtype=torch.bfloat16 if fast else torch.float32)
    assert vae_of(options, picture_models(options), CPU).weights == nbytes(loaded)


@pytest.mark.parametrize("mode", [None, "fp8", "fp8_scaled", "int8", "nf4"])
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_the_transformer(tiny_files, precision, mode):
    loaded = load_transformer(
        tiny_files.dit, device="cpu", dtype=precision.computing, kept=precision.kept, quantization=mode
    )
    weights = transformer_weights(loaded.config, precision, mode)
    assert weights.placed(Placement()).device == nbytes(loaded)


def test_flux_takes_little_over_two_bytes_a_weight():
    """23.8 GB in bfloat16, and 0.2 more where what belongs to no block is float32; 47.6 in float32."""
    kept = transformer_weights(FLUX, Precision(torch.float32, torch.bfloat16), None)
    plain, double = transformer_weights(FLUX, BFLOAT16, None), transformer_weights(FLUX, PRECISIONS[0], None)
    found, least, most = (each.placed(Placement()).device for each in (kept, plain, double))
    assert least < found < least * 1.01 and most == 2 * least


def test_a_weight_in_few_bits_is_restored_once_or_in_strips():
    """The largest is linear1 of the single blocks, of 7 times 3072 x 3072 numbers; a strip has 2 million."""
    computing = Precision(torch.float32, torch.bfloat16)
    for mode in (None, "fp8", "fp8_scaled", "int8", "nf4"):
        assert transformer_weights(FLUX, computing, mode).scratch == 4 * 7 * 3072**2
        assert transformer_weights(FLUX, computing, mode, strips=True).scratch == 4 * 2**21
    assert transformer_weights(FLUX, PRECISIONS[0], None, strips=True).scratch == 0


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("fp8", [False, True])
def test_so_are_those_of_t5(precision, fp8):
    """Its largest are 4096 x 10240."""
    options = Generate(fp8_t5=fp8)
    there = fp8 or precision.kept != precision.computing
    size = precision.computing.itemsize if there else 0
    assert text_of(options, MODELS.text, precision).scratch == size * 4096 * 10240
    assert text_of(options, MODELS.text, precision, strips=True).scratch == size * 2**21


def test_the_published_text_encoders():
    """T5-XXL's encoder has 4.76 thousand million parameters, CLIP-L's text model 123 million."""
    text = text_of(Generate(), MODELS.text, BFLOAT16)
    assert text.weights == 2 * (4_762_310_656 + 123_060_480)
