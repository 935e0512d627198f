"""How exact weights in few bits are."""

import pytest
import torch

from kontext.quant import BLOCK, FP8, dequantise, quantise, values
from kontext.quant.values import _round_to_fp8
from tests.memory.live import Calls

MODES = ("fp8", "fp8_scaled", "fp8_fast", "int8", "int8_fast", "nf4")
EXACT_MODES = MODES[:-1]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outlier_columns(weight):
    """0.3 % of the inputs 50 times larger, as attention and MLP weights of large models have them."""
    chosen = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(1)) < 0.003
    return weight * torch.where(chosen, 50.0, 1.0)


def error(weight, mode):
    quantised = quantise(weight, mode)
    restored = dequantise(quantised.weight, quantised.scale, torch.float32)
    return ((restored - weight).norm() / weight.norm()).item()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("fp8", 0.033), ("fp8_scaled", 0.0225), ("fp8_fast", 0.026), ("int8", 0.006), ("int8_fast", 0.0085),
     ("nf4", 0.092)],
)  # fmt: skip
def test_errors_of_normal_weights(mode, expected):
    assert error(0.02 * draw(256, 3072), mode) == pytest.approx(expected, rel=0.05)


def test_scales_pay_where_there_are_outliers():
    weight = outlier_columns(0.02 * draw(256, 3072))
    assert error(weight, "fp8_scaled") < error(weight, "fp8") / 3
    assert error(weight, "int8") < error(weight, "int8_fast") / 3


def test_scales_are_chosen_by_their_error():
    """Better than the smallest scale that cuts nothing off."""
    weight = draw(64, 256)
    blocks = weight.view(64, -1, BLOCK)
    smallest = blocks.abs().amax(-1, keepdim=True) / 448
    simple = ((blocks / smallest).to(FP8).float() * smallest - blocks).norm() / weight.norm()
    assert error(weight, "fp8_scaled") < 0.93 * simple


def test_rounding_to_8_bit_floats_is_torchs():
    """All of them, what lies halfway and to both sides of it, and anything else."""
    exact = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    halfway = (exact[1:] + exact[:-1]) / 2
    near = [torch.nextafter(halfway, torch.tensor(limit)) for limit in (0.0, 1e9)]
    some = [draw(2000, seed=seed) * 2.0 ** (seed - 12) for seed in range(19)]
    tried = torch.cat([exact, halfway, *near, *some, torch.tensor([449.5])])
    tried = torch.cat([tried, -tried])
    tried = tried[tried.abs() < 450]
    expected = tried.clamp(-448, 448).to(FP8).float()
    assert torch.equal(_round_to_fp8(tried.clone(), torch.empty_like(tried)), expected)


def test_the_same_in_strips_as_at_once(monkeypatch):
    weight = draw(50, 640)
    for mode in ("fp8_scaled", "int8", "int8_fast"):
        whole = quantise(weight, mode)
        monkeypatch.setattr(values, "STRIP", 7 * 640)
        strips = quantise(weight, mode)
        monkeypatch.undo()
        assert torch.equal(whole.weight.float(), strips.weight.float())
        assert torch.equal(whole.scale, strips.scale)


def test_a_plain_cast_is_torchs():
    weight = draw(8, 16)
    assert torch.equal(quantise(weight, "fp8").weight.float(), weight.to(FP8).float())
    assert quantise(torch.full((1, 1), 1e6), "fp8").weight.float() == 448


@pytest.mark.parametrize(("columns", "blocks"), [(192, 3), (64, 1), (100, 1)])
@pytest.mark.parametrize("mode", ["fp8_scaled", "int8"])
def test_blocks_of_64_or_rows(mode, columns, blocks):
    quantised = quantise(draw(8, columns), mode)
    assert quantised.scale.shape == (8, blocks) and quantised.scale.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("mode", "blocks"), [("fp8_scaled", 2), ("fp8_fast", 1), ("int8", 2), ("int8_fast", 1)]
)
def test_products_have_rows(mode, blocks):
    """One scale per row where a product can use it, and blocks where the weight is too odd for one."""
    assert quantise(draw(16, 128), mode).scale.shape == (16, blocks)
    assert quantise(draw(8, 128), mode).scale.shape == (8, 2)


@pytest.mark.parametrize("mode", ["fp8_scaled", "int8_fast", "nf4"])
def test_more_rows_than_are_done_at_once(mode):
    weight = draw(2500, 512)
    whole, last = quantise(weight, mode), quantise(weight[2400:], mode)
    assert torch.equal(whole.scale[2400:], last.scale)
    assert torch.equal(whole.weight[2400:].view(torch.int8), last.weight.view(torch.int8))


@pytest.mark.parametrize("mode", MODES)
def test_zeros_stay_zero(mode):
    quantised = quantise(torch.zeros(4, 128), mode)
    assert not dequantise(quantised.weight, quantised.scale, torch.float32).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", EXACT_MODES)
def test_dequantised_in_every_dtype(mode, dtype):
    quantised = quantise(0.02 * draw(16, 128), mode)
    exact = dequantise(quantised.weight, quantised.scale, torch.float64).to(dtype)
    found = dequantise(quantised.weight, quantised.scale, dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found, exact, rtol=0, atol=0)


def test_whole_numbers_are_restored_in_one_pass():
    quantised = quantise(draw(16, 128), "int8")
    with Calls() as calls:
        dequantise(quantised.weight, quantised.scale, torch.bfloat16)
    assert set(calls) - {"view", "unsqueeze"} == {"mul"} and calls["mul"] == 1
