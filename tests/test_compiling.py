"""Compiled blocks compute what plain ones do, in one graph for all blocks of a kind and all sizes."""

import shutil
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from kontext.compiling import compile_blocks
from kontext.errors import UserError
from kontext.memory.recompute import recompute_blocks
from kontext.memory.streaming import stream_blocks
from kontext.model.attention import rope
from kontext.model.transformer import Transformer
from kontext.quant import Mode, quantise, quantised_linear
from kontext.training.network import Network, build
from tests import tiny
from tests.lora.models import CONFIG, make_transformer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def forward(model: Transformer, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    img = torch.randn(1, tokens, CONFIG.in_channels, generator=generator)
    txt = torch.randn(1, 7, CONFIG.context_width, generator=generator)
    ids = torch.randint(0, 9, (1, tokens, 3), generator=generator).float()
    vector, t = torch.randn(1, CONFIG.vector_width, generator=generator), torch.tensor([0.5])
    return model(img, ids, txt, torch.zeros(1, 7, 3), t, vector, t)


@torch.no_grad()
def test_one_graph_serves_blocks_of_all_sizes() -> None:
    blocks = list(make_transformer().single_blocks)
    compile_blocks(torch.nn.ModuleList(blocks), CPU, backend="aot_eager")
    graphs = set()
    for tokens, block in zip((24, 40, 33), (*blocks, blocks[0]), strict=True):
        x, mod = torch.randn(1, tokens, CONFIG.width), torch.randn(1, 1, 3 * CONFIG.width)
        pe = rope(torch.rand(1, tokens, 3), CONFIG.axes, CONFIG.theta)
        torch.testing.assert_close(block(x, mod, pe), block.forward(x, mod, pe), rtol=1e-5, atol=1e-5)
        graphs.add(counters["stats"]["unique_graphs"])
    assert graphs == {1} and not counters["graph_break"]


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("fp8_fast", "lora"),
        *(pytest.param(None, kind, marks=pytest.mark.slow) for kind in ("lora", "dora", "loha", "lokr")),
    ],
)
def test_an_adapted_block_is_one_graph(mode: Mode | None, kind: str) -> None:
    """Forward with gradients: what adapters and weights in few bits ask for is asked where a compiler can follow."""
    model = Transformer(replace(CONFIG, double_blocks=1, single_blocks=1)).requires_grad_(False)
    if mode is not None:
        for name in ("linear1", "linear2"):
            linear = model.single_blocks[0].get_submodule(name)
            value = quantise(linear.weight.detach(), mode)
            model.single_blocks[0].set_submodule(name, quantised_linear(value, linear.bias, mode))
    only = {"include_patterns": (r"single.*linear\d",), "exclude_patterns": (".*",)}
    assert len(build(model, Network(rank=2, alpha=2, kind=kind, **only), seed=0)) == 2
    (block,) = model.single_blocks
    compile_blocks(model, CPU, backend="aot_eager")
    x, mod = torch.randn(1, 24, CONFIG.width, requires_grad=True), torch.randn(1, 1, 3 * CONFIG.width)
    block(x, mod, rope(torch.rand(1, 24, 3), CONFIG.axes, CONFIG.theta)).square().mean().backward()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.slow
@torch.no_grad()
def test_one_graph_serves_all_blocks_of_a_kind_and_all_sizes() -> None:
    model = make_transformer()
    assert len(model.double_blocks) > 1 and len(model.single_blocks) > 1
    expected = [forward(model, tokens) for tokens in (24, 40, 33)]
    compile_blocks(model, CPU, backend="aot_eager")
    first = forward(model, 24)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs <= 4 and not counters["graph_break"]
    found = [first, forward(model, 40), forward(model, 33)]
    assert counters["stats"]["unique_graphs"] == graphs
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def gradients(arrange: Callable[[Transformer], None]) -> list[Tensor]:
    model = tiny.randomise(Transformer(replace(CONFIG, double_blocks=1, single_blocks=1)), 0)
    modules = build(model, Network(rank=2, alpha=2), seed=0)
    for module in modules.values():
        torch.nn.init.constant_(module.lora_up.weight, 0.01)
    arrange(model)
    forward(model.train(), 24).square().mean().backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", [False, True])
def test_gradients_are_those_of_plain_blocks_also_streamed(recomputed: bool) -> None:
    def compiled(model: Transformer) -> None:
        compile_blocks(model, CPU, backend="aot_eager")
        stream_blocks(model, "max", CPU)
        if recomputed:
            recompute_blocks(model)

    expected = gradients(lambda model: None)
    torch.testing.assert_close(gradients(compiled), expected, rtol=1e-4, atol=1e-7)
    assert counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.filterwarnings("error:Torchinductor does not support")
@torch.no_grad()
def test_kernels_compute_the_same() -> None:
    model = make_transformer()
    expected = forward(model, 24)
    compile_blocks(model, CPU)
    torch.testing.assert_close(forward(model, 24), expected, rtol=1e-4, atol=1e-5)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="install g\\+\\+"):
        compile_blocks(make_transformer(), CPU)
