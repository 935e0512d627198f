"""Weights kept in float32 and computed with in bfloat16."""

import copy

import torch
from torch import nn

from kontext.memory.casting import compute_in


def test_it_computes_as_rounded_weights_do_and_keeps_exact_ones() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.SiLU(), nn.Linear(4, 3))
    kept = dict(model.named_parameters())
    rounded = copy.deepcopy(model).bfloat16()
    compute_in(model, [name for name in kept if not name.startswith("2.b")], torch.bfloat16)
    compute_in(model, ["2.bias"], torch.float32)
    model[2].bias.data = model[2].bias.data.bfloat16()
    x = torch.randn(2, 5).bfloat16()
    found, expected = model(x), rounded(x)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
    found.float().square().sum().backward()
    expected.float().square().sum().backward()
    for name, parameter in rounded.named_parameters():
        assert kept[name].grad is not None and torch.equal(kept[name].grad.bfloat16(), parameter.grad), name
    assert kept["0.weight"].dtype == kept["0.weight"].grad.dtype == torch.float32
    assert model[0].weight.dtype == torch.bfloat16
