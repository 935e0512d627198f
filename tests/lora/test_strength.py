"""Strengths by block: their text, and that merging and attaching scale each block's change by hand's numbers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kontext.checkpoints import load_transformer
from kontext.errors import UserError
from kontext.lora.branches import attach_adapters
from kontext.lora.files import save_lora
from kontext.lora.merge import merging
from kontext.lora.strength import Rule, Strength, as_strength, parse_strength
from tests.lora.models import relative_error
from tests.lora.reference import read
from tests.lora.test_branches import adapted, velocity

TEXT = "2:double=0.5,single=1.5,single1=0"
OF = {"double_blocks": 1.0, "single_blocks.0": 3.0, "single_blocks.1": 0.0}


@pytest.mark.parametrize(
    ("text", "module", "expected"),
    [
        ("0.8", "double_blocks.3.img_mlp.0", 0.8),
        ("1.0:double=0.5", "double_blocks.18.txt_mod.lin", 0.5),
        ("0.5:double=0.5", "single_blocks.0.linear1", 0.5),
        ("0.5:double=3", "img_in", 0.5),
        ("2:single3-10=0.8", "single_blocks.10.linear2", 1.6),
        ("2:single3-10=0.8", "single_blocks.11.linear2", 2.0),
        ("2:single3-10=0.8", "double_blocks.3.img_mlp.0", 2.0),
        ("1:single=0,single7=-1", "single_blocks.7.linear1", -1.0),
        ("1:single7=-1,single=0", "single_blocks.7.linear1", 0.0),
        ("1:double1=0", "double_blocks.10.img_mlp.0", 1.0),
    ],
)
def test_the_last_rule_that_holds_counts(text, module, expected):
    assert parse_strength(text).of(module) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["1", "-0.25", TEXT, "1e-07:double0-3=2,single5=0.125"])
def test_the_text_comes_back(text):
    assert str(parse_strength(text)) == text


def test_what_a_strength_may_be_given_as():
    assert as_strength(1) == as_strength("1.0") == as_strength(Strength()) == Strength(1.0)
    assert as_strength(" 1: single2 = 3".replace(" = ", "=")) == Strength(1.0, (Rule("single", 2, 2, 3.0),))


@pytest.mark.parametrize(
    "text", ["", "x", "nan", "inf", "1:", "1:double", "1:triple=2", "1:single=", "1:single5-3=1", "1:single-3=1",
             "1:double=1;single=2", ":double=1", "1:double=inf"],
)  # fmt: skip
def test_bad_texts(text):
    with pytest.raises(UserError, match="is no strength. Write a number, or a number and factors of blocks"):
        as_strength(text)


@torch.no_grad()
def test_each_block_has_its_own_strength_merged_and_attached(tmp_path: Path, tiny_files):
    _, modules = adapted(tiny_files.dit)
    save_lora(tmp_path / "a.safetensors", modules)
    file = read(tmp_path / "a.safetensors")
    expected = load_file(tiny_files.dit)
    for name, module in modules.items():
        (strength,) = (value for prefix, value in OF.items() if name.startswith(prefix))
        change = module.lora_up.weight @ module.lora_down.weight
        expected[f"{name}.weight"] += strength * module.alpha / module.rank * change

    def load(edit=None):
        return load_transformer(tiny_files.dit, device="cpu", dtype=torch.float32, edit=edit)

    merged = load(merging([file], [TEXT]))
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)
    attached = load()
    attach_adapters(attached, [file, file], [Strength(0.0), TEXT])
    assert relative_error(velocity(attached), velocity(merged)) < 1e-5
    assert relative_error(velocity(load(merging([file], [2.0]))), velocity(merged)) > 0.01
