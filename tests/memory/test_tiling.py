"""Strips of rows give what the whole picture gives, in half the memory."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from kontext.memory import tiling
from kontext.memory.tiling import Tiled, tile
from kontext.model.autoencoder import Autoencoder, AutoencoderConfig
from tests.compare import relative_error
from tests.memory.live import Live
from tests.tiny import randomise

SMALL = AutoencoderConfig(3, 32, (1, 2, 2), 2, 16, 0.3611, 0.1159)
LARGE = AutoencoderConfig(3, 128, (1, 2), 2, 16, 0.3611, 0.1159)  # the published one's largest levels


@pytest.fixture(scope="module")
def model():
    return randomise(Autoencoder(SMALL), 0).requires_grad_(False).double()


def both_ways(model, batch, height, width):
    """(whole, in strips) of encoding and of decoding."""
    g = torch.Generator().manual_seed(1)
    dtype = model.encoder.conv_in.weight.dtype
    images = torch.rand(batch, 3, height, width, generator=g).to(dtype) * 2 - 1
    latents = torch.randn(batch, 16, height // 4, width // 4, generator=g).to(dtype)
    tiled = tile(deepcopy(model), "on")
    return (model.encode(images), tiled.encode(images)), (model.decode(latents), tiled.decode(latents))


# A strip of 1 byte is a row; of 200,000 bytes it is an odd number of rows, other ones in each layer.
@pytest.mark.parametrize("strip", [1, 200_000, 2**25])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 36, 20), (2, 20, 44), (1, 4, 4)])
def test_equals_the_whole_picture(model, monkeypatch, strip, batch, height, width):
    """In float64, where rounding leaves room for no seam."""
    monkeypatch.setattr(tiling, "STRIP_BYTES", strip)
    for whole, strips in both_ways(model, batch, height, width):
        assert whole.shape == strips.shape
        assert relative_error(strips, whole) < 1e-11


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_rounds_no_worse(model, monkeypatch, dtype, limit):
    """Against float64, in which the same rounded weights are computed with."""
    monkeypatch.setattr(tiling, "STRIP_BYTES", 20_000)
    rounded = deepcopy(model).to(dtype)
    exact = both_ways(deepcopy(rounded).double(), 1, 32, 32)
    for (whole, strips), (right, _) in zip(both_ways(rounded, 1, 32, 32), exact, strict=True):
        error = relative_error(strips.double(), right)
        assert error < limit and error < 1.3 * relative_error(whole.double(), right)


@pytest.mark.parametrize(("direction", "share"), [("encode", 0.5), ("decode", 0.6)])
def test_memory(monkeypatch, direction, share):
    """A quarter of a megapixel, without numbers: on the meta device."""
    monkeypatch.setattr(tiling, "STRIP_BYTES", 2**22)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: torch.empty_like(q))
    with torch.device("meta"):
        model = Autoencoder(LARGE).to(torch.bfloat16).requires_grad_(False)
        given = {"encode": torch.empty(1, 3, 512, 512), "decode": torch.empty(1, 16, 256, 256)}[direction]
    peaks = []
    for each in (model, tile(deepcopy(model), "on")):
        with Live() as live, torch.no_grad():
            getattr(each, direction)(given.bfloat16())
        peaks.append(live.peak)
    assert peaks[1] < share * peaks[0]


def test_auto_asks_the_gpu(monkeypatch):
    """A picture needs `needs` bytes; one on the CPU is never cut."""
    asked = []
    monkeypatch.setattr(tiling, "free_bytes", lambda device: 1000)
    part = Tiled(
        torch.nn.Identity(), lambda pixels, itemsize: asked.append((pixels, itemsize)) or 400, always=False
    )
    x = torch.zeros(2, 16, 3, 5)
    assert not part.is_short(x)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert not part.is_short(x) and part.is_short(x.repeat(2, 1, 1, 1))
    assert asked[-1] == (15, 4)


def test_off_leaves_the_model_alone(model):
    plain = tile(deepcopy(model), "off")
    assert not any(isinstance(module, Tiled) for module in plain.modules())
