"""Adapters beside weights in few bits, in training."""

import pytest
import torch

from kontext.lora.linear import LoraLinear
from kontext.quant import quantise, quantised_linear


@pytest.mark.parametrize("mode", ["fp8", "fp8_scaled", "fp8_fast", "int8", "int8_fast", "nf4"])
def test_base_and_branch_add_up_and_both_pass_gradients_on(mode: str) -> None:
    generator = torch.Generator().manual_seed(0)
    base = quantised_linear(quantise(torch.randn(64, 128, generator=generator), mode), None, mode)
    adapter = LoraLinear(base, rank=4, alpha=2)
    for weight in (adapter.lora_down.weight, adapter.lora_up.weight):
        torch.nn.init.normal_(weight, generator=generator)
    x, y = (torch.randn(2, 32, 128, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    x.requires_grad_(), y.requires_grad_()
    out, expected = adapter(x), base(y) + 0.5 * y @ adapter.lora_down.weight.t() @ adapter.lora_up.weight.t()
    torch.testing.assert_close(out, expected)
    gradient = torch.randn(2, 32, 64, generator=generator)
    found = torch.autograd.grad(out, (x, adapter.lora_up.weight), gradient)
    wanted = torch.autograd.grad(expected, (y, adapter.lora_up.weight), gradient)
    torch.testing.assert_close(found, wanted)
