"""Four bits a weight: bitsandbytes' values, in two plain tensors."""

import sys

import pytest
import torch

from kontext.errors import UserError
from kontext.quant import dequantise, four, quantise
from tests.quant.test_values import draw

# The levels of NF4 as the paper prints them (Dettmers et al. 2023, appendix E).
LEVELS = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0]
)  # fmt: skip


def restored(weight):
    quantised = quantise(weight, "nf4")
    return dequantise(quantised.weight, quantised.scale, torch.float32)


def test_each_value_is_its_blocks_nearest_level():
    weight = draw(8, 192)
    blocks = weight.view(8, 3, 64)
    largest = blocks.abs().amax(-1, keepdim=True)
    nearest = ((blocks / largest)[..., None] - LEVELS).abs().argmin(-1)
    expected = LEVELS[nearest] * largest.bfloat16().float()
    torch.testing.assert_close(restored(weight), expected.view(8, 192), rtol=1e-6, atol=1e-7)


def test_the_values_are_bitsandbytes_own():
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = 0.02 * draw(48, 256)
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours = quantise(weight, "nf4")
    assert torch.equal(ours.weight.flatten(), packed.flatten())
    torch.testing.assert_close(restored(weight), dequantize_4bit(packed, state), rtol=2**-8, atol=0)


def test_what_is_kept():
    quantised = quantise(draw(48, 256), "nf4")
    assert (quantised.weight.shape, quantised.weight.dtype) == ((48, 128), torch.uint8)
    assert (quantised.scale.shape, quantised.scale.dtype) == ((48, 4), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types_are_the_rounded_values(dtype):
    quantised = quantise(draw(16, 128), "nf4")
    found = dequantise(quantised.weight, quantised.scale, dtype)
    exact = dequantise(quantised.weight, quantised.scale, torch.float32)
    torch.testing.assert_close(found, exact.to(dtype), rtol=0, atol=0)


def test_weights_of_half_precision_are_taken():
    weight = draw(16, 128).bfloat16()
    assert torch.equal(restored(weight), restored(weight.float()))


def test_without_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="--nf4 needs the package bitsandbytes"):
        four.pack(draw(8, 64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_restores_what_a_cpu_packed(dtype):
    host, device = quantise(draw(96, 256), "nf4"), quantise(draw(96, 256).cuda(), "nf4")
    expected = dequantise(host.weight, host.scale, dtype)
    assert torch.equal(dequantise(host.weight.cuda(), host.scale.cuda(), dtype).cpu(), expected)
    differ = (dequantise(device.weight, device.scale, dtype).cpu() != expected).float().mean()
    assert differ < 1e-3  # a value halfway between two levels may go either way
