"""The parts of the estimate, each against what really is in memory or a number of the published model."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kontext.memory.estimate import (
    Policy,
    Trained,
    Work,
    activations,
    decoding_picture,
    denoising,
    encoding_picture,
    reading_text,
    training,
)
from kontext.memory.needs import Vae
from kontext.memory.recompute import recompute_blocks
from kontext.memory.remaking import remake_blocks
from kontext.memory.tiling import tile
from kontext.memory.weights import Placed, weights_of
from kontext.model.autoencoder import Autoencoder, AutoencoderConfig
from kontext.model.t5 import T5Config, T5Encoder
from kontext.model.transformer import FLUX, Transformer, TransformerConfig
from kontext.training.network import Network, build
from tests.memory.live import Live

WEIGHTS = weights_of(FLUX, itemsize=2)
MEGAPIXEL = Work(batch=1, tokens=8704, itemsize=2)  # 1024x1024 with a reference of this size, and 512 of text
RANK_32 = Trained(parameters=112_066_560, optimizer=2 * 112_066_560)  # adamw8bit
AE = AutoencoderConfig(3, 128, (1, 2, 4, 4), 2, 16, 0.3611, 0.1159)


TOKENS, TEXT, RANK = 480, 32, 4


def small(double: int = 2, single: int = 2) -> TransformerConfig:
    return TransformerConfig(64, 64, 32, 24, 128, 2, 512, double, single, (16, 24, 24), 1e4, True)


def inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (
        torch.randn(1, TOKENS, 64, dtype=dtype), torch.zeros(1, TOKENS, 3), torch.randn(1, TEXT, 32, dtype=dtype),
        torch.zeros(1, TEXT, 3), torch.rand(1), torch.randn(1, 24, dtype=dtype), torch.ones(1),
    )  # fmt: skip


def really(config: TransformerConfig, policy: Policy, kind: str = "lora") -> tuple[int, int]:
    """Bytes that are alive between forward and backward of an adapter's training step, and at its worst moment.

    In float32: of 16 bits the CPU's RMS norm keeps copies in 32, which CUDA's does not.
    """
    model = Transformer(config).requires_grad_(False)
    build(model, Network(rank=RANK, alpha=RANK, kind=kind), seed=0)
    remake_blocks(model, policy)
    recompute_blocks(model, policy)
    with Live() as live:
        result = model.train()(*inputs(torch.float32))
        kept = live.now
        result.square().mean().backward()
    return kept, live.peak


def estimated(config: TransformerConfig, policy: Policy, kind: str = "lora") -> int:
    """The same of the estimate, with nothing but what a step makes."""
    adapters = list(build(Transformer(config), Network(rank=RANK, alpha=RANK, kind=kind), seed=0).values())
    trained = Trained(
        parameters=0,
        optimizer=0,
        ranks=RANK * (8 * config.double_blocks + 2 * config.single_blocks),
        outputs=adapters[0].keeps_output,
        scratch=adapters[0].dense * 7 * config.width**2 * 4,
        units=adapters[0].units,
    )
    policies = [policy] * (config.double_blocks + config.single_blocks)
    weights, work = weights_of(config, itemsize=4), Work(1, TOKENS + TEXT, 4)
    return training(weights, Placed(0, 0, 0), trained, work, policies).device


@pytest.mark.parametrize("policy", ["none", "selective", "whole"])
@pytest.mark.parametrize("more", [{"double": 4}, {"single": 4}], ids=str)
def test_what_blocks_keep(policy, more):
    """Two blocks more: so what lies outside the blocks does not count."""
    measured = (really(small(**more), policy)[0] - really(small(), policy)[0]) / 2
    work = Work(batch=1, tokens=TOKENS + TEXT, itemsize=4)
    ranks = RANK * (8 if "double" in more else 2)
    assert activations(small(), work, [policy], ranks=ranks).device == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("policy", ["none", "selective", "whole"])
def test_the_worst_moment_of_a_step(policy):
    assert estimated(small(), policy) == pytest.approx(really(small(), policy)[1], rel=0.05)


@pytest.mark.parametrize("policy", ["none", "selective", "whole"])
@pytest.mark.parametrize("kind", ["loha", "lokr", "dora"])
def test_the_worst_moment_of_other_adapters(kind, policy):
    """Their own products rarely meet the moment of the most activations, so it is taken a little too high."""
    assert estimated(small(), policy, kind) == pytest.approx(really(small(), policy, kind)[1], rel=0.1)


def test_the_worst_moment_of_a_picture():
    model, values = Transformer(small()).to(torch.bfloat16), inputs(torch.bfloat16)
    with Live() as live, torch.no_grad():
        model(*values)
    found = denoising(weights_of(small(), itemsize=2), Placed(0, 0, 0), Work(1, TOKENS + TEXT, 2), steps=1)
    assert found.device == pytest.approx(live.peak, rel=0.05)


def test_what_offloaded_blocks_keep_is_on_the_host():
    whole, offloaded = (activations(FLUX, MEGAPIXEL, [policy] * 57) for policy in ("whole", "offloaded"))
    assert (whole.host, offloaded.host) == (0, whole.device)
    assert offloaded.device == 2 * MEGAPIXEL.unit(FLUX)


def test_what_blocks_keep_of_the_published_model():
    """GB for 57 blocks, worked out by hand: a unit is 8704 x 3072 x 2 bytes, 53.5 MB."""

    def found(policy: Policy) -> tuple[float, float]:
        part = activations(FLUX, MEGAPIXEL, [policy] * 57)
        return part.device / 1e9, part.host / 1e9

    assert found("none") == (pytest.approx(57 * 9 * 0.05348 + 57 * 8704 * 24 * 4e-9, rel=1e-3), 0)
    assert found("selective") == (pytest.approx(57 * 2 * 0.05348 + 57 * 8704 * 24 * 4e-9, rel=1e-3), 0)
    assert found("whole") == (pytest.approx(3.048, rel=1e-3), 0)
    assert found("offloaded") == (pytest.approx(2 * 0.05348, rel=1e-3), pytest.approx(3.048, rel=1e-3))


def test_ranks_are_kept_where_nothing_is_recomputed():
    plain, ranked = (
        activations(FLUX, MEGAPIXEL, ["none"] * 57, ranks=ranks).device for ranks in (0, 228 * 32)
    )
    assert ranked - plain == 228 * 32 * 8704 * 2
    assert activations(FLUX, MEGAPIXEL, ["whole"] * 57, ranks=100) == activations(
        FLUX, MEGAPIXEL, ["whole"] * 57
    )


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_pictures_in_strips(direction, monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: torch.empty_like(q))
    with torch.device("meta"):
        model = tile(Autoencoder(AE).requires_grad_(False), "on")
        picture, latent = torch.empty(1, 3, 1024, 1024), torch.empty(1, 16, 128, 128)
    with Live() as live, torch.no_grad():
        model.encode(picture) if direction == "encode" else model.decode(latent)
    vae = Vae(AE, weights=0, itemsize=4, tiled=True)
    found = vae.encoding(2**20) if direction == "encode" else vae.decoding(2**20)
    assert found.device == pytest.approx(live.peak, rel=0.05)


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


def test_the_worst_moment_of_reading_a_prompt():
    """About right: beside 9.5 GB of weights it is 0.3."""
    config = T5Config(100, 64, 160, 3, heads=4, head_width=16, buckets=32, furthest=128, eps=1e-6)
    model, ids = T5Encoder(config).requires_grad_(False), torch.zeros(1, 256, dtype=torch.long)
    with Live() as live, torch.no_grad():
        model(ids)
    assert reading_text(0, heads=4, length=256, width=64).device == pytest.approx(live.peak, rel=0.3)


def test_the_average_is_float32_beside_weights_in_bfloat16():
    whole = Trained(parameters=100, optimizer=400, itemsize=2, averaged=True, replaces=200)
    assert [part.device for part in whole.parts()] == [100 * 2 + 100 * 4, 400]
