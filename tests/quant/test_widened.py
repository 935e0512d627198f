"""Linears that keep 16 bits and compute in float32."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from kontext.quant import keep_in, restored
from kontext.quant.widened import WidenedLinear
from tests.quant.test_values import draw


def layer_of(*, bias=True, out=50, columns=64):
    return WidenedLinear(draw(out, columns).bfloat16(), None, draw(out, seed=2) if bias else None)


@pytest.fixture(params=[64 * 7, 64 * 50, 64 * 1000, 1], ids=["strips", "one", "large", "rows"])
def strip(request, monkeypatch):
    """Strips of 7 rows, the last of one; one that is the whole weight; more than that; rows one by one."""
    monkeypatch.setattr(restored, "STRIP", request.param)


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_linear_of_the_rounded_weight(strip, bias):
    layer = layer_of(bias=bias)
    x, y = (draw(2, 5, 64, seed=3).requires_grad_() for _ in range(2))
    out, expected = layer(x), F.linear(y, layer.weight.float(), layer.bias)
    assert out.dtype == torch.float32 and out.shape == expected.shape
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    gradient = draw(2, 5, 50, seed=4)
    out.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)
    assert all(p.grad is None and not p.requires_grad for p in layer.parameters())


def test_the_backward_pass_keeps_the_weight_as_it_is():
    layer, seen = layer_of(), []
    with saved_tensors_hooks(lambda tensor: seen.append(tensor) or tensor, lambda tensor: tensor):
        layer(draw(3, 64).requires_grad_())
    assert [(tensor.dtype, tensor.data_ptr()) for tensor in seen] == [
        (torch.bfloat16, layer.weight.data_ptr())
    ]


def test_what_comes_out_may_be_added_to_in_place():
    """As adapters do, with rows alone and with a batch of them."""
    layer = layer_of()
    for shape in ((5, 64), (2, 5, 64)):
        x, y = (draw(*shape, seed=3).requires_grad_() for _ in range(2))
        out, apart = layer(x), layer(y)
        out += x[..., :50]
        torch.testing.assert_close(out, apart + y[..., :50])
        out.square().sum().backward()
        (apart + y[..., :50]).square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad)


def test_a_compiler_sees_the_same():
    layer = layer_of()
    x, y = (draw(5, 64, seed=3).requires_grad_() for _ in range(2))
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    layer(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)


def test_linears_of_an_empty_model_are_replaced():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2, bias=False))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert keep_in(model, ["1"], torch.bfloat16) == {"1.weight"}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    assert type(model[0]) is nn.Linear and type(model[1]) is WidenedLinear
    assert (model[1].in_features, model[1].out_features, model[1].weight.dtype) == (6, 2, torch.bfloat16)
