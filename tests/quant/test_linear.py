"""Linears in few bits behave as linears."""

import pytest
import torch
import torch.nn.functional as F

from kontext.quant import ProductLinear, QuantisedLinear, quantise, quantised_linear
from tests.quant.test_values import MODES, draw

RESTORED = ("fp8", "fp8_scaled", "int8", "nf4")


def layer_of(mode, *, bias=None, out=48, columns=128):
    return quantised_linear(quantise(draw(out, columns), mode), bias, mode)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", RESTORED)
def test_forward_and_gradient_are_those_of_the_dequantised_linear(mode, bias):
    layer = layer_of(mode, bias=draw(48, seed=2) if bias else None)
    weight = layer.dequantised(torch.float32)
    x, y = (draw(2, 5, 128, seed=3).requires_grad_() for _ in range(2))
    out, expected = layer(x), F.linear(y, weight, layer.bias)
    assert torch.equal(out, expected)
    gradient = draw(2, 5, 48, seed=4)
    out.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(x.grad, y.grad)
    assert all(p.grad is None and not p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("mode", ["fp8_fast", "int8_fast"])
def test_products_forward_and_back(mode):
    """Near the linear of the same weight, and nothing trained but through x."""
    layer = layer_of(mode, bias=draw(48, seed=2))
    assert type(layer) is ProductLinear
    x, y = (draw(2, 40, 128, seed=3).requires_grad_() for _ in range(2))
    out, expected = layer(x), F.linear(y, layer.dequantised(torch.float32), layer.bias)
    assert out.shape == expected.shape and 1e-4 < (out - expected).norm() / expected.norm() < 0.04
    gradient = draw(2, 40, 48, seed=4)
    out.backward(gradient)
    expected.backward(gradient)
    assert 1e-4 < (x.grad - y.grad).norm() / y.grad.norm() < 0.04
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_what_comes_out_may_be_added_to_in_place(mode):
    """As adapters do."""
    layer = layer_of(mode)
    x, y = (draw(2, 40, 128, seed=3).requires_grad_() for _ in range(2))
    out, apart = layer(x), layer(y)
    out[..., 8:] += x[..., :40]
    added = apart + F.pad(y[..., :40], (8, 0))
    assert torch.equal(out, added)
    for total in (out, added):
        total.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize(("out", "columns"), [(40, 128), (48, 104)])
@pytest.mark.parametrize("mode", ["fp8_fast", "int8_fast"])
def test_sizes_that_products_do_not_take_are_restored(mode, out, columns):
    layer = layer_of(mode, out=out, columns=columns)
    assert type(layer) is QuantisedLinear
    x = draw(3, columns)
    assert torch.equal(layer(x), x @ layer.dequantised(torch.float32).t())


@pytest.mark.parametrize("mode", MODES)
def test_autograd_keeps_the_rounded_weight_alone(mode):
    layer = layer_of(mode)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(draw(2, 128).requires_grad_())
    own = {t.data_ptr() for t in (layer.weight, layer.scale) if t is not None}
    assert {t.data_ptr() for t in kept} == own


@pytest.mark.parametrize("mode", MODES)
def test_sizes_are_those_of_the_linear(mode):
    layer = layer_of(mode)
    assert (layer.out_features, layer.in_features) == (48, 128)
    assert layer.dequantised(torch.bfloat16).shape == (48, 128)


@pytest.mark.parametrize("mode", ["fp8_scaled", "nf4"])
def test_state_round_trip(mode):
    layer = layer_of(mode, bias=torch.zeros(48))
    meta = QuantisedLinear(
        layer.weight.detach().to("meta"), layer.scale.to("meta"), torch.zeros(48, device="meta")
    )
    meta.load_state_dict(layer.state_dict(), strict=True, assign=True)
    assert torch.equal(meta(torch.ones(1, 128)), layer(torch.ones(1, 128)))


@pytest.mark.parametrize("mode", ["fp8_scaled", "fp8_fast", "int8_fast", "nf4"])
def test_one_compiled_graph_for_every_length(mode):
    """Nothing in these layers breaks a graph, or asks for a new one when the picture's size changes."""
    layer, graphs = layer_of(mode, bias=draw(48, seed=2)), []

    def note(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=note, fullgraph=True, dynamic=True)
    for tokens in (40, 64, 72):
        x, y = (draw(2, tokens, 128, seed=3).requires_grad_() for _ in range(2))
        found, expected = compiled(x), layer(y)
        torch.testing.assert_close(found, expected)
        for out in (found, expected):
            out.square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
    assert len(graphs) == 1
