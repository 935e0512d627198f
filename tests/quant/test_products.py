"""Products of 8-bit numbers: how exact they are in both directions, and that folding the scale costs nothing."""

import pytest
import torch
import torch.nn.functional as F

from kontext.quant import FP8, dequantise, products, quantise, quantised_linear
from kontext.quant.products import multiply, multiply_back, round_rows
from tests.memory.live import Calls
from tests.quant.test_values import draw

FAST = ("fp8_fast", "int8_fast")
BOUND = {"fp8_fast": 0.04, "int8_fast": 0.013}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def apart(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture(params=FAST)
def mode(request):
    return request.param


@pytest.fixture
def weight():
    return 0.02 * draw(512, 768)


def test_a_forward_product_of_normal_weights(mode, weight):
    x, rounded = draw(40, 768, seed=1), quantise(weight, mode)
    error = apart(multiply(x, rounded.weight, rounded.scale, None), x @ weight.t())
    assert BOUND[mode] / 2 < error < BOUND[mode]


def test_a_backward_product_of_normal_weights(mode, weight):
    gradient, rounded = draw(40, 512, seed=1), quantise(weight, mode)
    error = apart(multiply_back(gradient, rounded.weight, rounded.scale), gradient @ weight)
    assert BOUND[mode] / 2 < error < BOUND[mode]


def test_a_folded_scale_is_exact(mode, weight):
    """But for the rounding of the gradient nothing is lost: (dY s_w) W_q is dY (s_w W_q)."""
    rounded = quantise(weight * torch.logspace(-2, 2, 512)[:, None], mode)
    gradient = draw(40, 512, seed=1)
    values, by_row = round_rows(gradient * rounded.scale.view(-1).float(), rounded.weight.dtype)
    as_rounded = values.double() * by_row.double() / rounded.scale.view(-1).double()
    expected = as_rounded @ dequantise(rounded.weight, rounded.scale, torch.float64)
    assert apart(multiply_back(gradient, rounded.weight, rounded.scale), expected) < 1e-6


def test_a_forward_product_is_that_of_the_rounded_numbers(mode, weight):
    rounded, bias = quantise(weight, mode), draw(512, seed=2)
    values, by_row = round_rows(draw(40, 768, seed=1), rounded.weight.dtype)
    expected = (values.double() * by_row) @ dequantise(
        rounded.weight, rounded.scale, torch.float64
    ).t() + bias
    assert apart(multiply(draw(40, 768, seed=1), rounded.weight, rounded.scale, bias), expected) < 1e-6


@pytest.mark.parametrize("size", [1e-20, 1e-6, 1.0, 1e4])
def test_rows_of_any_size(mode, weight, size):
    """Each token has its own scale: none loses digits to a neighbour, and small gradients do not vanish."""
    gradient = draw(4, 512, seed=1) * torch.tensor([[1.0], [size], [size], [0.0]])
    rounded = quantise(weight, mode)
    found = multiply_back(gradient, rounded.weight, rounded.scale)
    expected = gradient @ weight
    assert apart(found[1:3] / size, expected[1:3] / size) < BOUND[mode]
    assert not found[3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_result_has_the_type_of_the_input(mode, weight, dtype):
    rounded, x = quantise(weight, mode), draw(3, 768, seed=1)
    found = multiply(x.to(dtype), rounded.weight, rounded.scale, draw(512).to(dtype))
    assert found.dtype == dtype and apart(found, x @ weight.t() + draw(512)) < BOUND[mode]
    gradient = draw(3, 512, seed=1)
    found = multiply_back(gradient.to(dtype), rounded.weight, rounded.scale)
    assert found.dtype == dtype and apart(found, gradient @ weight) < BOUND[mode]


def test_a_plain_cast_needs_no_scale():
    """Files cast to fp8 are multiplied as they are."""
    weight, x = draw(32, 64).to(FP8), draw(5, 64, seed=1)
    assert apart(multiply(x, weight, None, None), x @ weight.float().t()) < 0.04
    assert apart(multiply_back(x[:, :32], weight, None), x[:, :32] @ weight.float()) < 0.04


def test_rows_lie_one_after_the_other(mode, weight):
    """As CUDA's kernels want them, also of a gradient that is a view of something turned."""
    rounded, turned = quantise(weight, mode), draw(512, 40, seed=1).t()
    assert round_rows(turned, rounded.weight.dtype)[0].is_contiguous()
    expected = multiply_back(turned.contiguous(), rounded.weight, rounded.scale)
    assert torch.equal(multiply_back(turned, rounded.weight, rounded.scale), expected)


def test_rows_are_rounded_to_fp8_in_one_pass():
    """bfloat16 is neither widened nor rounded twice on the way, and what is turned is not laid out anew before."""
    x = draw(64, 40).bfloat16().t()
    with Calls() as calls:
        values, by_row = round_rows(x, FP8)
    assert (
        calls["linalg_vector_norm"] == 1 and calls["_to_copy"] <= 1 and calls["clone"] + calls["copy_"] == 0
    )
    assert torch.equal(values.float(), (x.float() / by_row).to(FP8).float())


def test_sums_of_whole_numbers_are_scaled_in_two_passes():
    """And in one backward. What rounds to 16 bits is the last of them."""
    rounded, x, bias = quantise(draw(64, 96), "int8_fast"), draw(40, 96).bfloat16(), draw(64)
    with Calls() as calls:
        multiply(x, rounded.weight, rounded.scale, bias)
    assert (calls["mul"], calls["addcmul"]) == (1, 1) and calls["mul_"] + calls["add_"] == 0
    with Calls() as calls:
        multiply_back(draw(40, 64).bfloat16(), rounded.weight, None)
    assert calls["mul"] == 1


def test_what_is_not_a_number_shows(mode, weight):
    rounded, x = quantise(weight, mode), draw(2, 768)
    x[1, 5] = torch.inf
    found = multiply(x, rounded.weight, rounded.scale, None)
    assert found[0].isfinite().all() and not found[1].isfinite().any()


def test_whole_numbers_do_not_wrap_around():
    """bfloat16 rounds 127 and a bit up to 128, which is -128 in 8 bits."""
    x = (draw(2000, 64) * 37).bfloat16()
    values, by_row = round_rows(x, torch.int8)
    assert apart(values * by_row, x) < 0.02


def test_a_device_is_asked_for_what_it_can(monkeypatch):
    assert products.supported(torch.device("cpu"), FP8)
    assert not products.supported(torch.device("cpu"), torch.int8)
    pretended = torch.device("meta")  # computes nothing, as a card that cannot
    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    assert not products.supported(pretended, FP8)


def refuse(*args, **kwargs):
    raise RuntimeError("torch._scaled_mm is only supported on CUDA devices with compute capability >= 8.9")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("tokens", [5, 512, 4097])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_gpu_multiplies_as_the_cpu_does(mode, dtype, tokens):
    kind = quantise(torch.ones(16, 64), mode).weight.dtype
    if not products.supported(torch.device("cuda"), kind):
        pytest.skip(f"this GPU has no products of {kind}")
    rounded = quantise(0.02 * draw(768, 3072), mode)
    host = quantised_linear(rounded, draw(768).to(dtype), mode)
    x, gradient = draw(1, tokens, 3072, seed=1).to(dtype), draw(1, tokens, 768, seed=2).to(dtype)
    expected = both_ways(host, x, gradient)
    found = both_ways(host.cuda(), x.cuda(), gradient.cuda())
    for one, other in zip(found, expected, strict=True):
        assert apart(one.cpu(), other) < 0.01  # fp8 is summed in less than float32 there


def both_ways(layer, x, gradient):
    x = x.requires_grad_()
    out = layer(x)
    (back,) = torch.autograd.grad(out, x, gradient)
    return out.detach(), back


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("kept", ["fp8", "fp8_scaled", "int8", "nf4"])
def test_a_gpu_restores_weights_as_the_cpu_does(kept):
    host = quantised_linear(quantise(0.02 * draw(768, 3072), kept), None, kept)
    x, gradient = draw(1, 64, 3072, seed=1), draw(1, 64, 768, seed=2)
    expected = F.linear(x, host.dequantised(torch.float32)), gradient @ host.dequantised(torch.float32)
    for one, other in zip(both_ways(host.cuda(), x.cuda(), gradient.cuda()), expected, strict=True):
        assert apart(one.cpu(), other) < 2e-3  # TF32 may be on
