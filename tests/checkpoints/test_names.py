"""The name table against the hand-written renaming of tests/bfl_names.py, on real model objects."""

import pytest
import torch

from kontext.checkpoints import names
from kontext.checkpoints.names import Part
from tests import bfl_names, tiny

SIZES = {"width": tiny.WIDTH, "mlp_width": 4 * tiny.WIDTH}


@pytest.fixture(scope="module")
def transformer():
    return tiny.make_transformer(seed=7).state_dict()


def test_every_transformer_tensor_has_its_place(transformer):
    expected = bfl_names.bfl_transformer(transformer, tiny.DOUBLE, tiny.SINGLE)
    built = {name: torch.full_like(value, torch.nan) for name, value in expected.items()}
    for key, value in transformer.items():
        name, part = names.bfl_tensor(key)
        if part.name == names.SWAPPED:
            value = torch.cat(value.chunk(2)[::-1])
        built[name][names.part_rows(part, **SIZES)] = value
    assert all(torch.equal(built[name], expected[name]) for name in expected)


def test_modules_are_enumerated_in_both_directions(transformer):
    expected = bfl_names.bfl_transformer(transformer, tiny.DOUBLE, tiny.SINGLE)
    modules = list(names.bfl_modules(tiny.DOUBLE, tiny.SINGLE, norms=True))
    assert set(modules) == {name.rpartition(".")[0] for name in expected}
    parts = [d for module in modules for d in names.diffusers_modules(module)]
    assert sorted(parts) == sorted({key.rpartition(".")[0] for key in transformer})
    for module in modules:
        for index, part in enumerate(names.diffusers_modules(module)):
            assert names.locate(part) == Part(module, index, len(names.diffusers_modules(module)))


def test_norms_are_left_out_unless_asked_for():
    assert not [m for m in names.bfl_modules(1, 1) if "_norm" in m]


@pytest.mark.parametrize(
    ("module", "place"),
    [
        ("transformer_blocks.18.attn.add_v_proj", Part("double_blocks.18.txt_attn.qkv", 2, 3)),
        ("single_transformer_blocks.37.proj_mlp", Part("single_blocks.37.linear1", 3, 4)),
        ("single_transformer_blocks.3.proj_out", Part("single_blocks.3.linear2", 0, 1)),
        ("proj_out", Part("final_layer.linear", 0, 1)),
        ("transformer_blocks.0.attn.to_z", None),
        ("down_blocks.0.attn.to_q", None),
    ],
)
def test_locate(module, place):
    assert names.locate(module) == place


def test_rows_of_the_published_sizes():
    place = names.locate("single_transformer_blocks.0.proj_mlp")
    assert names.part_rows(place, width=3072, mlp_width=12288) == slice(9216, 21504)
    place = names.locate("transformer_blocks.0.attn.to_k")
    assert names.part_rows(place, width=3072, mlp_width=12288) == slice(3072, 6144)


def test_unknown_modules_have_no_parts():
    assert names.diffusers_modules("double_blocks.0.img_attn.q") == ()
    assert names.diffusers_modules("input_blocks.1.0") == ()


def test_every_autoencoder_tensor_has_its_name():
    state = tiny.make_autoencoder(seed=7).state_dict()
    expected = bfl_names.bfl_autoencoder(state, levels=4)
    renamed = {names.autoencoder_tensor(key, levels=4): value for key, value in state.items()}
    assert set(renamed) == set(expected)
    assert all(torch.equal(renamed[name].flatten(), expected[name].flatten()) for name in expected)


def test_autoencoder_bfl_names_stay():
    for name in (
        "encoder.down.0.block.1.nin_shortcut.weight",
        "decoder.mid.attn_1.q.bias",
        "decoder.up.3.upsample.conv.bias",
    ):
        assert names.autoencoder_tensor(name, levels=4) == name
