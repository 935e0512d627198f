"""Some outputs of every kind of linear are those among all, and of the last block no more is multiplied than is needed."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kontext.lora.dora import DoraLinear
from kontext.lora.linear import LoraLinear
from kontext.lora.products import LohaLinear, LokrLinear
from kontext.model.blocks import SingleStreamBlock
from kontext.model.outputs import some_outputs
from kontext.quant import quantise, quantised_linear

ROWS = slice(64, 192)
MODES = ["fp8", "fp8_scaled", "fp8_fast", "int8", "nf4"]
ADAPTERS = [LoraLinear, DoraLinear, LohaLinear, LokrLinear]


def plain(*, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(128, 256, bias=bias)


def assert_rows(linear: nn.Module) -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 3, 128, requires_grad=True)
    gradient = torch.randn(2, 3, 128)
    found, expected = some_outputs(linear, x, ROWS), linear(x)[..., ROWS]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(out, x, gradient)[0] for out in (found, expected)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("bias", [True, False])
def test_of_a_plain_linear(bias: bool) -> None:
    assert_rows(plain(bias=bias))


@pytest.mark.parametrize("mode", MODES)
def test_of_a_quantised_one(mode: str) -> None:
    linear = plain()
    assert_rows(quantised_linear(quantise(linear.weight.data, mode), linear.bias.detach(), mode))


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("mode", [None, "int8"])
def test_of_an_adapted_one(kind: type, mode: str | None) -> None:
    base = plain()
    if mode:
        base = quantised_linear(quantise(base.weight.data, mode), base.bias.detach(), mode)
    linear = kind(base, rank=4, alpha=2)
    for parameter in linear.learned.values():
        nn.init.normal_(parameter, std=0.1)
    assert_rows(linear)


@torch.no_grad()
def test_no_more_is_multiplied_than_is_needed() -> None:
    """Of 60 tokens 20 are wanted: keys and values (2 D) of all, the other 10 D of a third."""
    width, tokens, wanted = 32, 60, 20
    block = SingleStreamBlock(width, 2, 4 * width)
    x, mod, pe = torch.randn(1, tokens, width), torch.randn(1, 1, 3 * width), torch.ones(1, 1, tokens, 8) + 0j
    with FlopCounterMode(display=False) as counter:
        block(x, mod, pe, wanted=(10, wanted))
    counts = counter.get_flop_counts()["Global"]
    linears = sum(count for name, count in counts.items() if "attention" not in str(name))
    assert linears == 2 * width**2 * (2 * tokens + 10 * wanted)
