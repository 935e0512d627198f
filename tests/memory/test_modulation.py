"""Modulation on the host: the same digits, and the weights visit the device once per picture."""

import pytest
import torch
from torch import nn

from kontext.denoiser import Conditioning, Denoiser
from kontext.flow import schedule
from kontext.memory.modulation import HostModulation, offload_modulation
from kontext.memory.streaming import Slab, stream_blocks
from kontext.model.transformer import Transformer, TransformerConfig
from kontext.sampler import euler

CONFIG = TransformerConfig(64, 64, 8, 8, 32, 2, 64, 2, 3, (4, 6, 6), 1e4, True)
X = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(2))


def build():
    torch.manual_seed(0)
    return Transformer(CONFIG).requires_grad_(False)


def denoise(model, *, prepare):
    g = torch.Generator().manual_seed(1)
    given = Conditioning(torch.randn(2, 3, 8, generator=g), torch.randn(2, 8, generator=g), (X,), 2.5)
    denoiser, sigmas = Denoiser(model, given), schedule(4, 4)
    if prepare:
        denoiser.prepare(sigmas[:-1])
    return euler(denoiser, X, sigmas)


@pytest.mark.parametrize("prepare", [False, True])
def test_same_digits(prepare):
    model = build()
    spared = offload_modulation(model, torch.device("cpu"))
    # 2 double blocks with two modulations of 6 parts, 3 single ones of 3 parts; weight and bias in float32.
    assert spared == (2 * 2 * 6 + 3 * 3) * (32 * 32 + 32) * 4
    assert torch.equal(denoise(model, prepare=prepare), denoise(build(), prepare=False))


def test_weights_visit_once_when_prepared(monkeypatch):
    model = build()
    offload_modulation(model, torch.device("cpu"))
    calls = []
    forward = HostModulation.forward
    monkeypatch.setattr(
        HostModulation,
        "forward",
        lambda self, vecs: calls.append([vec.shape for vec in vecs]) or forward(self, vecs),
    )
    denoise(model, prepare=True)
    assert calls == [[(2, 32)] * 4] * (2 * 2 + 3)


def test_streamed_blocks_leave_modulation_alone():
    model = build()
    slab = Slab(model.single_blocks[0])
    assert all(piece.module is not model.single_blocks[0].modulation.lin for piece in slab.pieces)
    assert any(isinstance(piece.module, nn.Linear) for piece in slab.pieces)


def test_with_streaming():
    model = build()
    offload_modulation(model, torch.device("cpu"))
    stream_blocks(model, "max", torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(denoise(model, prepare=True), denoise(build(), prepare=False))
