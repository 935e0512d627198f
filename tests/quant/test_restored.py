"""Products with weights that are restored some rows at a time."""

import pytest
import torch
import torch.nn.functional as F

from kontext.quant import dequantise, quantise, restored, restores_strips
from kontext.quant.restored import Restored
from tests.memory.live import Live
from tests.quant.test_values import draw

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MODES = ["fp8", "fp8_scaled", "int8", "nf4"]
OUT, COLUMNS, ROWS = 512, 128, 7


@pytest.fixture(params=[None, *MODES], ids=str)
def parts(request):
    """A weight in 16 bits, or in fewer, and its scale."""
    weight = draw(OUT, COLUMNS)
    if request.param is None:
        return weight.bfloat16(), None
    found = quantise(weight, request.param)
    return found.weight, found.scale


@pytest.fixture(autouse=True)
def strip(monkeypatch):
    """37 strips of 14 rows; the last has 8."""
    monkeypatch.setattr(restored, "STRIP", 14 * COLUMNS)


@pytest.mark.parametrize("bias", [draw(OUT, seed=2), None], ids=["bias", "none"])
def test_both_products_are_those_of_the_whole_weight(parts, bias):
    plain = dequantise(*parts, torch.float32)
    x, gradient = draw(ROWS, COLUMNS, seed=3), draw(ROWS, OUT, seed=4)
    torch.testing.assert_close(
        Restored.forth(x, *parts, bias), F.linear(x, plain, bias), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(Restored.back(gradient, *parts), gradient @ plain, rtol=1e-5, atol=1e-4)


def test_the_whole_weight_is_never_there(parts):
    """Beside the result, which is smaller: some rows, and for 4 bits what is made while they are restored."""
    x, gradient = draw(ROWS, COLUMNS), draw(ROWS, OUT)
    result, strips = 4 * ROWS * OUT, 4 * restored.STRIP * 4
    for product in (lambda: Restored.forth(x, *parts, None), lambda: Restored.back(gradient, *parts)):
        with Live() as live:
            product()
        assert live.peak < result + strips < 4 * OUT * COLUMNS / 5


def test_sums_in_16_bits_are_not_cut(parts):
    """There each of 37 additions would round."""
    x, gradient = draw(ROWS, COLUMNS).bfloat16(), draw(ROWS, OUT).bfloat16()
    plain = dequantise(*parts, torch.bfloat16)
    assert torch.equal(Restored.forth(x, *parts, None), F.linear(x, plain))
    assert torch.equal(Restored.back(gradient, *parts), gradient @ plain)


def test_where_strips_are_restored():
    places = [(CPU, torch.float32), (CPU, torch.bfloat16), (CUDA, torch.float32)]
    assert [restores_strips(*place) for place in places] == [True, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_room_that_is_given_is_used(parts, dtype):
    weight, scale = parts
    room = torch.empty(OUT, COLUMNS, dtype=dtype)
    found = dequantise(weight, scale, dtype, room=room)
    assert torch.equal(found, dequantise(weight, scale, dtype)) and found.dtype == dtype
    assert (found is room) == (weight.dtype != torch.uint8)
