from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kontext.checkpoints import load_transformer
from kontext.errors import UserError
from kontext.lora.adapter import LoraLinear, attach
from kontext.lora.deltas import Decomposed, Delta, LowRank, Target
from kontext.lora.files import AdapterFile, save_lora
from kontext.lora.merge import merge_weight, merging, spread
from kontext.lora.strength import Strength
from tests.lora.models import CONFIG, relative_error
from tests.lora.reference import read


def low_rank(name: str, seed: int, rows: slice = slice(0, 6)) -> Delta:
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(rows.stop - rows.start, 2, generator=generator)
    down = torch.randn(2, 5, generator=generator)
    return Delta(Target(f"{name}.weight", rows.start, rows.stop), LowRank(down, up, 0.5), name)


def adapter(*deltas: Delta) -> AdapterFile:
    named = {d.target.tensor: (d,) for d in deltas}
    return AdapterFile(Path("a"), "kohya/musubi", named, (), (), {})


def test_several_adapters_add_up_at_their_strengths():
    a, b = low_rank("x", 1), low_rank("x", 2, slice(2, 4))
    weight = torch.randn(6, 5)
    before = weight.clone()
    merged = merging([adapter(a), adapter(b)], [2.0, -0.5])("x.weight", weight)
    expected = before + 2.0 * 0.5 * a.change.up @ a.change.down
    expected[2:4] -= 0.5 * 0.5 * b.change.up @ b.change.down
    torch.testing.assert_close(merged, expected)
    assert torch.equal(weight, before)


def test_what_no_adapter_names_comes_back_itself():
    weight = torch.randn(6, 5)
    assert merging([adapter(low_rank("x", 1))], [])("y.weight", weight) is weight


def test_order_means_nothing_even_with_dora():
    dora = Delta(Target("x.weight", 0, 6), Decomposed(low_rank("x", 1).change, torch.rand(6, 1)), "x")
    plain = low_rank("x", 2)
    weight = torch.randn(6, 5)
    one = merge_weight(weight.clone(), [(dora, 0.7), (plain, 0.4)])
    other = merge_weight(weight.clone(), [(plain, 0.4), (dora, 0.7)])
    torch.testing.assert_close(one, other)
    assert torch.equal(merge_weight(weight.clone(), [(dora, 0.0)]), weight)


def test_patterns_choose_modules():
    file = adapter(low_rank("a.0", 1), low_rank("a.1", 2), low_rank("b.0", 3))
    weight = torch.randn(6, 5)

    def merged(**patterns: list[str]) -> list[str]:
        edit = merging([file], [1.0], **patterns)
        return [name for name in ("a.0", "a.1", "b.0") if edit(f"{name}.weight", weight) is not weight]

    assert merged(include_patterns=[r"a\..*"]) == ["a.0", "a.1"]
    assert merged(exclude_patterns=[r"a\..*"]) == ["b.0"]
    assert merged(include_patterns=[r"a\..*"], exclude_patterns=[r".*\.0"]) == ["a.1"]
    with pytest.raises(UserError, match="leave no module to merge"):
        merged(include_patterns=["a"])
    with pytest.raises(UserError, match="not a regular expression"):
        merged(exclude_patterns=["["])


def test_multipliers():
    half, double = Strength(0.5), Strength(2.0)
    assert spread([], 2) == [Strength(), Strength()]
    assert spread([0.5], 3) == [half] * 3
    assert spread([half, "2"], 2) == [half, double]
    with pytest.raises(UserError, match="2 multipliers were given for 3 LoRAs"):
        spread([1.0, 1.0], 3)


def adapted(path: Path) -> tuple[torch.nn.Module, dict[str, LoraLinear]]:
    """A loaded model with random adapters attached to it."""
    model = load_transformer(path, device="cpu", dtype=torch.float32)
    modules = attach(model, rank=4, alpha=3.0, seed=1)
    generator = torch.Generator().manual_seed(2)
    for module in modules.values():
        torch.nn.init.normal_(module.lora_up.weight, std=0.3, generator=generator)
    return model, modules


@torch.no_grad()
def velocity(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    img = torch.randn(2, 12, CONFIG.in_channels, generator=generator)
    txt = torch.randn(2, 5, CONFIG.context_width, generator=generator)
    vector = torch.randn(2, CONFIG.vector_width, generator=generator)
    img_ids, txt_ids = torch.rand(2, 12, 3, generator=generator), torch.zeros(2, 5, 3)
    t, guidance = torch.tensor([0.3, 0.8]), torch.tensor([2.5, 1.0])
    return model(img, img_ids, txt, txt_ids, t, vector, guidance)


def test_a_model_merged_while_loading_equals_the_adapted_one(tmp_path: Path, tiny_files):
    model, modules = adapted(tiny_files.dit)
    save_lora(tmp_path / "a.safetensors", modules)
    edit = merging([read(tmp_path / "a.safetensors")], [1.0])
    for path in (tiny_files.dit, tiny_files.dit_sharded):
        merged = load_transformer(path, device="cpu", dtype=torch.float32, edit=edit)
        assert relative_error(velocity(merged), velocity(model)) < 1e-5
    base = load_transformer(tiny_files.dit, device="cpu", dtype=torch.float32)
    assert relative_error(velocity(base), velocity(model)) > 0.1


def test_merging_leaves_the_file_alone(tmp_path: Path, tiny_files):
    before = load_file(tiny_files.dit)
    _, modules = adapted(tiny_files.dit)
    save_lora(tmp_path / "a.safetensors", modules)
    edit = merging([read(tmp_path / "a.safetensors")], [1.0])
    load_transformer(tiny_files.dit, device="cpu", dtype=torch.float32, edit=edit)
    assert all(torch.equal(before[k], v) for k, v in load_file(tiny_files.dit).items())
