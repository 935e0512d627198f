"""Rotary positions and attention against diffusers and plain formulas."""

import torch

from kontext.model.attention import attention, rope, rotate, sdpa
from kontext.model.latents import position_ids
from tests.compare import relative_error

AXES = (4, 14, 14)


def test_rotation_is_diffusers():
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    ids = torch.cat((torch.zeros(3, 3), position_ids(4, 5), position_ids(3, 2, index=1)))
    x = torch.randn(2, 2, len(ids), 32)
    expected = apply_rotary_emb(x, FluxPosEmbed(theta=10_000, axes_dim=AXES)(ids), sequence_dim=2)
    assert relative_error(rotate(x, rope(ids[None], AXES, 10_000.0)), expected) < 1e-6


def test_rotation_keeps_lengths_and_depends_on_differences():
    q, k = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32)

    def score(at, to):
        a, b = (rotate(x, rope(torch.tensor([[p]]), AXES, 10_000.0)) for x, p in ((q, at), (k, to)))
        assert torch.allclose(a.norm(), q.norm())
        return (a * b).sum()

    same = score([0.0, 3, 5], [1.0, 7, 2])
    assert torch.allclose(score([2.0, 10, 11], [3.0, 14, 8]), same, rtol=1e-4)
    assert not torch.allclose(score([0.0, 3, 5], [1.0, 8, 2]), same, rtol=1e-2)


def test_large_positions_keep_their_digits():
    """Angle 4096 rad in float32 would be off by 2e-4."""
    pe = rope(torch.tensor([[[0.0, 4096.0, 0.0]]]), AXES, 10_000.0)
    assert abs(pe[0, 0, 0, 2].real.item() - torch.tensor(4096.0, dtype=torch.float64).cos().item()) < 1e-6


def test_attention_is_the_formula():
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    weights = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1)
    expected = (weights @ v).transpose(1, 2).reshape(2, 5, 24)
    torch.testing.assert_close(attention(q, k, v, sdpa), expected)
