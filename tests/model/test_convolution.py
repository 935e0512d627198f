"""Convolutions with fewer products give what torch's give."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from kontext.model import convolution
from kontext.model.convolution import Conv3x3, DoublingConv3x3
from tests.compare import relative_error


def layer_and_map(kind, height, width, *, batch=1, channels=64, dtype=torch.float64):
    torch.manual_seed(0)
    layer = kind(channels, channels + 8).to(dtype).requires_grad_(False)
    x = torch.randn(batch, channels, height, width, dtype=dtype)
    return (part.to(memory_format=torch.channels_last) for part in (layer, x))


def plain(layer, x):
    if isinstance(layer, DoublingConv3x3):
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return F.conv2d(x, layer.weight, layer.bias, padding=1)


def flops(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", [Conv3x3, DoublingConv3x3])
@pytest.mark.parametrize("strip", [1, 100_000, 2**25])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 16, 16), (2, 17, 21), (1, 30, 9), (1, 3, 99)])
def test_equals_torch(monkeypatch, kind, strip, batch, height, width):
    """In float64, with strips of fours of rows and what is left of them."""
    monkeypatch.setattr(convolution, "STRIP_BYTES", strip)
    layer, x = layer_and_map(kind, height, width, batch=batch)
    expected = plain(layer, x)
    assert relative_error(layer(x), expected) < 1e-13
    out = torch.empty_like(expected[:, :, layer.scale : -layer.scale])
    layer.rows(x, out)
    assert relative_error(out, expected[:, :, layer.scale : -layer.scale]) < 1e-13


@pytest.mark.parametrize("kind", [Conv3x3, DoublingConv3x3])
def test_rounds_about_as_well(kind):
    """How much farther than torch's from the result in float64."""
    layer, x = layer_and_map(kind, 32, 32, channels=256, dtype=torch.float32)
    found, direct = layer(x), plain(layer, x)
    exact = plain(layer.double(), x.double())
    assert not torch.equal(found, direct)
    assert (found - exact).norm() < 1.6 * (direct - exact).norm()


@pytest.mark.parametrize(("kind", "share"), [(Conv3x3, 1 / 2), (DoublingConv3x3, 1 / 4)])
def test_products(kind, share):
    """For a map of 64 x 63, whose differences have 65 x 64 places."""
    layer, x = layer_and_map(kind, 64, 63)
    assert flops(lambda: layer(x)) == pytest.approx(share * flops(lambda: plain(layer, x)), rel=0.03)


@pytest.mark.parametrize("kind", [Conv3x3, DoublingConv3x3])
@pytest.mark.parametrize(
    ("channels", "side", "dtype"), [(56, 16, "float32"), (64, 15, "float32"), (64, 16, "bfloat16")]
)
def test_leaves_the_rest_to_torch(kind, channels, side, dtype):
    """Few channels, small maps, and numbers without digits to spare."""
    layer, x = layer_and_map(kind, side, side, channels=channels, dtype=getattr(torch, dtype))
    assert torch.equal(layer(x), plain(layer, x))


@pytest.mark.parametrize("kind", [Conv3x3, DoublingConv3x3])
def test_gradients(kind):
    layer, x = layer_and_map(kind, 16, 16)
    x.requires_grad_()
    (found,), (expected,) = (
        torch.autograd.grad(f(x).square().sum(), x) for f in (layer, lambda x: plain(layer, x))
    )
    assert relative_error(found, expected) < 1e-13
