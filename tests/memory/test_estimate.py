"""The parts of the estimate, each against what really is in memory or a number of the published model."""

import pytest
import torch
import torch.nn.functional as F

from kontext.lora.adapter import attach
from kontext.memory.estimate import (
    Policy,
    Trained,
    Work,
    activations,
    decoding_picture,
    encoding_picture,
)
from kontext.memory.recompute import recompute_blocks
from kontext.memory.weights import weights_of
from kontext.model.autoencoder import Autoencoder, AutoencoderConfig
from kontext.model.transformer import Transformer, TransformerConfig
from tests.memory.live import Live
from tests.memory.test_placement import REAL

WEIGHTS = weights_of(REAL, itemsize=2)
MEGAPIXEL = Work(batch=1, tokens=8704, itemsize=2)  # 1024x1024 with a reference of this size, and 512 of text
RANK_32 = Trained(parameters=112_066_560, optimizer=2 * 112_066_560)  # adamw8bit
AE = AutoencoderConfig(3, 128, (1, 2, 4, 4), 2, 16, 0.3611, 0.1159)


def small(singles: int) -> TransformerConfig:
    return TransformerConfig(64, 64, 32, 24, 64, 2, 256, 2, singles, (4, 14, 14), 1e4, True)


def kept(config: TransformerConfig, policy: Policy, tokens: int = 480, text: int = 32) -> int:
    """Bytes that are alive between forward and backward of a LoRA's training step."""
    model = Transformer(config)
    attach(model, rank=4, alpha=4, seed=0)
    if policy == "whole":
        recompute_blocks(model)
    inputs = (
        torch.randn(1, tokens, 64), torch.zeros(1, tokens, 3), torch.randn(1, text, 32), torch.zeros(1, text, 3),
        torch.rand(1), torch.randn(1, 24), torch.ones(1),
    )  # fmt: skip
    with Live() as live:
        result = model(*inputs)
        assert result.requires_grad
        return live.now


def test_a_recomputed_block_keeps_its_input():
    """Two blocks more, so that what lies outside the blocks does not count."""
    work = Work(batch=1, tokens=512, itemsize=4)
    more = kept(small(4), "whole") - kept(small(2), "whole")
    assert activations(small(2), work, ["whole"] * 2).device == pytest.approx(more, rel=0.02)


def test_what_blocks_keep_of_the_published_model():
    """GB for 57 blocks, worked out by hand: a unit is 8704 x 3072 x 2 bytes, 53.5 MB."""

    def found(policy: Policy) -> tuple[float, float]:
        part = activations(REAL, MEGAPIXEL, [policy] * 57)
        return part.device / 1e9, part.host / 1e9

    assert found("none") == (pytest.approx(57 * 9 * 0.05348 + 57 * 8704 * 24 * 4e-9, rel=1e-3), 0)
    assert found("selective") == (pytest.approx(57 * 2 * 0.05348 + 57 * 8704 * 24 * 4e-9, rel=1e-3), 0)
    assert found("whole") == (pytest.approx(3.048, rel=1e-3), 0)
    assert found("offloaded") == (pytest.approx(2 * 0.05348, rel=1e-3), pytest.approx(3.048, rel=1e-3))


def test_ranks_are_kept_where_nothing_is_recomputed():
    plain, ranked = (
        activations(REAL, MEGAPIXEL, ["none"] * 57, ranks=ranks).device for ranks in (0, 228 * 32)
    )
    assert ranked - plain == 228 * 32 * 8704 * 2
    assert activations(REAL, MEGAPIXEL, ["whole"] * 57, ranks=100) == activations(
        REAL, MEGAPIXEL, ["whole"] * 57
    )


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("config", [AE, AutoencoderConfig(3, 32, (1, 2, 2, 2), 1, 16, 0.3611, 0.1159)])
def test_pictures_at_full_size(direction, config, monkeypatch):
    """The real model at its real size, without numbers: on the meta device."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: torch.empty_like(q))
    with torch.device("meta"):
        model = Autoencoder(config).to(torch.bfloat16).requires_grad_(False)
        picture = torch.empty(1, 3, 1024, 768, dtype=torch.bfloat16)
        latent = torch.empty(1, 16, 128, 96, dtype=torch.bfloat16)
    with Live() as live, torch.no_grad():
        model.encode(picture) if direction == "encode" else model.decode(latent)
    stage = {"encode": encoding_picture, "decode": decoding_picture}[direction]
    found = stage(config, 0, pixels=1024 * 768, itemsize=2)
    assert found.device == pytest.approx(live.peak, rel=0.03)
