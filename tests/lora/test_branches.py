from pathlib import Path

import pytest
import torch

from kontext.checkpoints import load_transformer
from kontext.errors import UserError
from kontext.lora.branches import Branched, attach_adapters
from kontext.lora.deltas import Change, Decomposed, Delta, Difference, Hadamard, Kronecker, LowRank, Target
from kontext.lora.files import AdapterFile, save_lora
from kontext.lora.merge import merging
from kontext.lora.strength import Strength
from kontext.quant import dequantise, quantise
from tests.lora.models import CONFIG, relative_error
from tests.lora.reference import read
from tests.lora.test_merge import adapted, velocity
from tests.memory.live import Calls


def random_changes() -> list[Delta]:
    """Every kind of change, on whole weights and on rows of them."""
    torch.manual_seed(0)
    width = CONFIG.width

    def low_rank(rows: int) -> LowRank:
        return LowRank(torch.randn(3, width), torch.randn(rows, 3), 0.05)

    hadamard = Hadamard(*(torch.randn(s) for s in ((width, 2), (2, width)) * 2), 0.05)
    kronecker = Kronecker(torch.randn(4, 8), torch.randn(16, 8), 0.05)
    block = "double_blocks.0."
    placed: list[tuple[str, int, int, Change]] = [
        (f"{block}img_attn.qkv.weight", 64, 128, low_rank(64)),
        (f"{block}img_attn.qkv.bias", 0, 192, Difference(torch.randn(192))),
        (f"{block}img_attn.proj.weight", 0, 64, hadamard),
        (f"{block}txt_attn.proj.weight", 0, 64, kronecker),
        (f"{block}txt_attn.qkv.weight", 0, 64, Difference(0.1 * torch.randn(64, width))),
        (f"{block}img_mlp.0.weight", 0, 256, Decomposed(low_rank(256), torch.rand(256, 1) + 0.5)),
        ("single_blocks.1.linear1.weight", 0, 192, Decomposed(low_rank(192), torch.rand(1, width) + 0.5)),
        ("img_in.weight", 0, 64, low_rank(64)),
    ]
    return [Delta(Target(name, start, stop), change, name) for name, start, stop, change in placed]


def adapter(*deltas: Delta) -> AdapterFile:
    return AdapterFile(Path("a"), "any", {d.target.tensor: (d,) for d in deltas}, (), (), {})


@torch.no_grad()
def test_attached_equals_merged(tiny_files):
    file = adapter(*random_changes())
    model = load_transformer(tiny_files.dit, device="cpu", dtype=torch.float32)
    attach_adapters(model, [file], [0.7])
    edit = merging([file], [0.7])
    merged = load_transformer(tiny_files.dit, device="cpu", dtype=torch.float32, edit=edit)
    base = load_transformer(tiny_files.dit, device="cpu", dtype=torch.float32)
    assert relative_error(velocity(model), velocity(merged)) < 1e-5
    assert relative_error(velocity(base), velocity(merged)) > 0.05


@torch.no_grad()
def test_strengths_change_between_passes(tmp_path: Path, tiny_files):
    trained, modules = adapted(tiny_files.dit)
    save_lora(tmp_path / "a.safetensors", modules)
    file = read(tmp_path / "a.safetensors")
    model = load_transformer(tiny_files.dit, device="cpu", dtype=torch.float32)
    base = velocity(model)
    attached = attach_adapters(model, [file, file], [0.25, 0.75])
    assert relative_error(velocity(model), velocity(trained)) < 1e-5
    attached.set_strengths([0.0])
    assert torch.equal(velocity(model), base)
    attached.set_strengths([2.0, -1.0])
    assert relative_error(velocity(model), velocity(trained)) < 1e-5
    with pytest.raises(UserError, match="3 multipliers"):
        attached.set_strengths([1, 2, 3])


@torch.no_grad()
@pytest.mark.parametrize("quantization", ["fp8", "fp8_scaled", "int8", "nf4"])
def test_beside_rounded_weights_nothing_of_the_adapter_is_rounded(tmp_path: Path, tiny_files, quantization):
    def load(edit=None):
        return load_transformer(
            tiny_files.dit, device="cpu", dtype=torch.float32, quantization=quantization, edit=edit
        )

    file = adapter(*random_changes())
    attached = load()
    attach_adapters(attached, [file], [1.0])
    layer, edit = "double_blocks.0.img_mlp.0", merging([file], [1.0])
    base = load().get_submodule(layer)
    x = torch.randn(5, CONFIG.width)
    expected = torch.nn.functional.linear(
        x, edit(f"{layer}.weight", base.dequantised(torch.float32)), base.bias
    )
    assert relative_error(attached.get_submodule(layer)(x), expected) < 1e-5


@pytest.mark.parametrize(("mode", "times"), [("fp8", 2.5), ("fp8_scaled", 2), ("nf4", 4)])
def test_merging_before_rounding_would_bury_an_adapter(mode, times):
    """Why adapters stay beside rounded weights: an adapter of 1 % of a weight drowns in its own rounding.

    Beside them, the weight that acts differs from the rounded one by the adapter and nothing else.
    """

    def rounded(weight):
        quantised = quantise(weight, mode)
        return dequantise(quantised.weight, quantised.scale, torch.float32)

    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(256, 1024, generator=generator)
    change = torch.randn(256, 8, generator=generator) @ torch.randn(8, 1024, generator=generator)
    change *= 0.01 * weight.norm() / change.norm()
    noise = rounded(weight + change) - rounded(weight) - change
    assert noise.norm() > times * change.norm()


@torch.no_grad()
def test_a_lora_beside_a_weight_takes_one_pass_over_the_output():
    torch.manual_seed(0)
    name = "linear.weight"
    changes = [LowRank(torch.randn(4, 32), torch.randn(rows, 4), 0.5) for rows in (96, 64)]
    deltas = [
        Delta(Target(name, start, stop), change, name)
        for change, start, stop in zip(changes, (0, 32), (96, 96), strict=True)
    ]
    branched = Branched(torch.nn.Linear(32, 96), [Strength(0.7)])
    x = torch.randn(2, 8, 32)
    base = branched(x)
    branched.weights = [(delta, 0) for delta in deltas]
    with Calls() as calls:
        found = branched(x)
    expected = base.clone()
    for delta in deltas:
        expected[..., delta.target.start :] += 0.7 * x @ delta.change.dense(x).T
    assert relative_error(found, expected) < 1e-6
    assert calls["mul"] + calls["add_"] + calls["copy_"] == 0 and calls["addmm_"] == 2


def test_norms_cannot_be_attached(tiny_files):
    name = "double_blocks.0.img_attn.norm.query_norm.scale"
    file = adapter(Delta(Target(name, 0, 32), Difference(torch.ones(32)), name))
    model = load_transformer(tiny_files.dit, device="cpu", dtype=torch.float32)
    with pytest.raises(UserError, match="changes the norm .* can be merged"):
        attach_adapters(model, [file], [1.0])
