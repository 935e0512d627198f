"""Against plain autograd, and by what is kept."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch.autograd.graph import saved_tensors_hooks

from kontext.model.attention import rope, rotate
from kontext.model.elementwise import split_heads, turned
from tests.memory.live import Calls


def plain(x: torch.Tensor, scale: torch.Tensor, pe: torch.Tensor) -> torch.Tensor:
    return rotate(F.rms_norm(x, scale.shape, scale.to(x.dtype), eps=1e-6), pe)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_turned_is_norm_and_rotation_in_both_directions(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    pe = rope(torch.randint(0, 50, (1, 7, 3)).float(), (4, 6, 6), 1e4)
    gradient = torch.randn(2, 3, 7, 16).to(dtype)
    found = []
    for function in (turned, plain):
        x = torch.randn(2, 7, 3, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
        scale = torch.linspace(0.5, 1.5, 16).requires_grad_()
        x.requires_grad_()
        out = function(x.transpose(1, 2), scale, pe)
        out.backward(gradient)
        found.append((out.detach(), x.grad, scale.grad))
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_only_the_input_is_kept() -> None:
    """Also in bfloat16, where the norm by itself would keep copies in float32."""
    x = torch.randn(1, 2, 9, 16, dtype=torch.bfloat16, requires_grad=True)
    kept: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        turned(x, torch.ones(16), rope(torch.zeros(1, 9, 3), (4, 6, 6), 1e4))
    large = [tensor for tensor in kept if tensor.numel() >= x.numel()]
    assert [tensor.data_ptr() for tensor in large] == [x.data_ptr()]


def test_few_passes_over_memory() -> None:
    """In bfloat16: three forward, beside the norm, of which the last rounds; and no head is laid out anew."""
    torch.manual_seed(0)
    x = torch.randn(1, 9, 2, 16, dtype=torch.bfloat16).requires_grad_()
    pe = rope(torch.zeros(1, 9, 3), (4, 6, 6), 1e4)
    with Calls() as forward:
        out = turned(x.transpose(1, 2), torch.ones(16), pe)
    assert out.stride() == x.transpose(1, 2).stride()
    assert forward["mul"] + forward["mul_"] == 3 and forward["_to_copy"] + forward["clone"] == 0
    with Calls() as backward:
        out.backward(torch.randn_like(out))
    assert backward["_to_copy"] == 1 and backward["linalg_vector_norm"] == 0


@pytest.mark.parametrize("rest", [0, 5])
def test_heads_are_split_in_both_directions(rest: int) -> None:
    x = torch.randn(2, 3, 24 + rest, requires_grad=True)
    parts = split_heads(x, 2, 8)
    assert all(part.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for part in parts)
    qkv, hidden = x.split((24, rest), -1)
    expected = (*rearrange(qkv, "B L (three H D) -> three B H L D", three=3, H=2), hidden)
    weights = [torch.randn_like(part) for part in expected]
    found = torch.autograd.grad(sum((w * p).sum() for w, p in zip(weights, parts, strict=True)), x)
    plain = torch.autograd.grad(sum((w * p).sum() for w, p in zip(weights, expected, strict=True)), x)
    assert all(map(torch.equal, parts, expected)) and torch.equal(*found, *plain)
