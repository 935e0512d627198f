"""What autograd keeps of a block is counted, and gradients are compared with those of the plain block, to the bit."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from kontext.memory.recompute import recompute_blocks
from kontext.memory.remaking import remake_blocks
from kontext.memory.streaming import stream_blocks
from kontext.model.transformer import Transformer
from kontext.training.network import Network, build
from tests import tiny
from tests.lora.models import CONFIG

WIDTH, TEXT, IMAGE = 128, 16, 48
TOKENS = TEXT + IMAGE
CPU = torch.device("cpu")


def adapted(*, double: int, single: int, **network: float) -> Transformer:
    config = replace(CONFIG, width=WIDTH, heads=2, mlp_width=4 * WIDTH, axes=(16, 24, 24))
    config = replace(config, double_blocks=double, single_blocks=single)
    model = tiny.randomise(Transformer(config), 0)
    torch.manual_seed(1)
    modules = build(model, Network(rank=2, alpha=2, **network), seed=0)
    for module in modules.values():  # so that gradients reach every part
        for parameter in module.learned.values():
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def forward(model: Transformer) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, IMAGE, CONFIG.in_channels, generator=generator)
    text = torch.randn(1, TEXT, CONFIG.context_width, generator=generator)
    vector, t = torch.randn(1, CONFIG.vector_width, generator=generator), torch.tensor([0.5])
    ids = torch.randint(0, 9, (1, IMAGE, 3), generator=generator).float()
    inputs = tokens, ids, text, torch.zeros(1, TEXT, 3), t, vector, t
    return model(*(tensor.to(model.img_in.weight.device) for tensor in inputs))


def kept(model: Transformer) -> float:
    """Tensors of (tokens x width) that a forward pass keeps in its blocks, counted by storage."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.numel() > TOKENS * 8:  # less is of one value a head
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward(model)
    assert out.requires_grad
    return sum(storages.values()) / (TOKENS * WIDTH * 4)


def gradients(model: Transformer) -> list[Tensor]:
    torch.manual_seed(5)
    forward(model).square().mean().backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


def per_block(wrap: Callable[[Transformer], None], kind: str) -> float:
    """What one more block of this kind keeps."""
    found = []
    for count in (2, 3):
        model = adapted(**{"double": 1, "single": 1, kind: count})
        wrap(model)
        found.append(kept(model))
    return found[1] - found[0]


@pytest.mark.parametrize("kind", ["single", "double"])
def test_nine_tensors_are_kept_of_a_block(kind: str) -> None:
    assert per_block(lambda model: None, kind) > 15
    assert per_block(remake_blocks, kind) == pytest.approx(9, abs=0.1)


@pytest.mark.parametrize("kind", ["single", "double"])
def test_two_are_kept_when_projections_are_made_again(kind: str) -> None:
    assert per_block(lambda model: remake_blocks(model, "selective"), kind) == pytest.approx(2, abs=0.1)


def test_attention_does_not_run_again() -> None:
    model = adapted(double=1, single=1)
    calls = []
    for block in model.blocks():
        plain = block.attend
        block.attend = lambda *qkv, plain=plain: calls.append(1) or plain(*qkv)
    remake_blocks(model, "selective")
    gradients(model)
    assert len(calls) == 2


def arranged(model: Transformer, *, selective: bool, streamed: bool, recomputed: bool) -> None:
    remake_blocks(model, "selective" if selective else "none")
    if streamed:
        stream_blocks(model, "max", CPU)
    if recomputed:
        recompute_blocks(model)


PLAIN, DROPOUT, DORA, LOKR = {}, {"dropout": 0.3}, {"kind": "dora"}, {"kind": "lokr"}
MODULATION = {"include_patterns": (r".*(mod\.lin|modulation\.lin|linear2|mlp\.2)",)}


@pytest.mark.parametrize(
    ("network", "selective", "streamed", "recomputed"),
    [
        (PLAIN, False, False, False),
        (PLAIN, True, True, False),
        (PLAIN, False, True, True),
        (DROPOUT, False, False, False),
        (DROPOUT, True, True, False),
        (DROPOUT, True, False, True),
        (DORA, True, True, False),
        (LOKR, True, False, True),
        (MODULATION, False, False, True),
    ],
    ids=str,
)
def test_gradients_are_those_of_the_plain_block(
    network: dict, selective: bool, streamed: bool, recomputed: bool
) -> None:
    expected = gradients(adapted(double=2, single=2, **network))
    model = adapted(double=2, single=2, **network)
    arranged(model, selective=selective, streamed=streamed, recomputed=recomputed)
    found = gradients(model)
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))
