"""The fused product against plain autograd, and by what it keeps."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from kontext.lora.adapted import Plain
from kontext.lora.dora import DoraLinear
from kontext.lora.linear import LoraLinear
from kontext.quant import quantise, quantised_linear


def lora(mode: str | None = None) -> LoraLinear:
    torch.manual_seed(0)
    base: nn.Module = nn.Linear(64, 128)
    if mode:
        base = quantised_linear(quantise(base.weight.data, mode), base.bias.detach(), mode)
    linear = LoraLinear(base, rank=4, alpha=2)
    for parameter in linear.learned.values():
        nn.init.normal_(parameter, std=0.1)
    return linear


def plain(linear: LoraLinear, x: Tensor) -> Tensor:
    """As the formula says."""
    change = F.linear(F.linear(x, linear.lora_down.weight), linear.lora_up.weight)
    return linear.base(x) + linear.scale * change


@pytest.mark.parametrize("mode", [None, "int8", "fp8_fast"])
def test_gradients_are_those_of_the_formula(mode: str | None) -> None:
    linear = lora(mode)
    torch.manual_seed(1)
    x, gradient = torch.randn(2, 5, 64, requires_grad=True), torch.randn(2, 5, 128)
    wanted = (x, *linear.learned.values())
    found, expected = linear(x), plain(linear, x)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        *(torch.autograd.grad(out, wanted, gradient) for out in (found, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_an_input_without_gradient_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block's linears: no product with the base's weight in the backward pass."""
    products: list[int] = []
    plain_back = Plain.back
    monkeypatch.setattr(Plain, "back", lambda *parts: products.append(1) or plain_back(*parts))
    linear = lora()
    for needed in (False, True):
        linear(torch.randn(3, 64, requires_grad=needed)).sum().backward()
        assert len(products) == needed
    assert all(parameter.grad is not None for parameter in linear.learned.values())


def test_only_the_input_and_the_small_hidden_values_are_kept() -> None:
    linear, x = lora(), torch.randn(32, 64, requires_grad=True)
    weights = {parameter.data_ptr() for parameter in linear.parameters()}
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        linear(x)
    activations = [tensor for tensor in kept if tensor.data_ptr() not in weights]
    assert sorted(tensor.numel() for tensor in activations) == [32 * 4, 32 * 64]
    assert max(activations, key=Tensor.numel).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_stretched_product_is_that_of_the_formula(dropout: float) -> None:
    """DoRA: m V x / |V| + b, with |V| taken as a number (as in peft), and dropout between the factors."""
    torch.manual_seed(0)
    base = nn.Linear(64, 128)
    linear = DoraLinear(base, rank=4, alpha=2, dropout=dropout)
    for name, parameter in linear.learned.items():
        nn.init.normal_(parameter, mean=float(name == "dora_scale"), std=0.1)
    x, gradient = torch.randn(2, 5, 64, requires_grad=True), torch.randn(2, 5, 128)
    wanted = (x, *linear.learned.values())

    def formula() -> Tensor:
        down, up = linear.lora_down.weight, linear.lora_up.weight
        length = (base.weight + linear.scale * up @ down).norm(dim=1).detach()
        hidden = F.dropout(F.linear(x, down), dropout)
        straight = F.linear(x, base.weight) + linear.scale * F.linear(hidden, up)
        return linear.dora_scale[:, 0] / length * straight + base.bias

    results = []
    for compute in (lambda: linear(x), formula):
        torch.manual_seed(1)
        out = compute()
        results.append((out, *torch.autograd.grad(out, wanted, gradient)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
