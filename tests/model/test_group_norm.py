"""Group norms of maps whose channels lie together, against float64."""

import pytest
import torch
import torch.nn.functional as F

from kontext.model import group_norm
from kontext.model.group_norm import GroupNorm, by_channel
from tests.compare import relative_error


def norm_and_map(*, batch=2, side=64, mean=1.0):
    torch.manual_seed(0)
    norm = GroupNorm(8, 32, eps=1e-6).requires_grad_(False)
    norm.weight.normal_()
    norm.bias.normal_()
    x = torch.randn(batch, 32, side, side) + mean * torch.randn(1, 32, 1, 1)
    return norm, x.to(memory_format=torch.channels_last)


def exact(norm, x):
    return F.group_norm(x.double(), 8, norm.weight.double(), norm.bias.double(), norm.eps)


@pytest.mark.parametrize("strip", [1, 20_000, 2**21])
@pytest.mark.parametrize("mean", [0.0, 1.0, 100.0])
def test_is_exact_to_rounding(monkeypatch, strip, mean):
    """A large mean itself costs what its rounding does: 100 has three digits fewer after the point."""
    monkeypatch.setattr(group_norm, "STRIP_BYTES", strip)
    norm, x = norm_and_map(mean=mean)
    assert relative_error(norm(x), exact(norm, x)) < 3e-7 * max(1, mean / 10)
    assert norm(x).is_contiguous(memory_format=torch.channels_last)


def test_is_more_exact_than_torch():
    norm, x = norm_and_map(batch=1, side=256)
    torchs = F.group_norm(x, 8, norm.weight, norm.bias, norm.eps)
    assert 3 * relative_error(norm(x), exact(norm, x)) < relative_error(torchs, exact(norm, x))


def test_parts_may_be_any_rows():
    norm, x = norm_and_map()
    scale, shift = by_channel(norm.double(), x.double(), x.double().split((1, 60, 3), 2))
    assert relative_error(x.double() * scale + shift, exact(norm, x)) < 1e-13


def test_gradients_and_other_types_are_torchs():
    norm, x = norm_and_map()
    halves = norm.to(torch.bfloat16)(x.bfloat16())
    assert torch.equal(halves, F.group_norm(x.bfloat16(), 8, norm.weight, norm.bias, norm.eps))
    norm.float()(x.requires_grad_()).sum().backward()
    assert x.grad is not None
