"""Transformers that come in fp8: a plain cast, or with scales as ComfyUI writes them."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from kontext.checkpoints import load_transformer
from kontext.errors import UserError
from kontext.quant import FP8, ProductLinear
from tests import bfl_names, tiny
from tests.checkpoints.test_transformer import CPU, QKV, edit_qkv

INPUT_SUFFIX = {"scale_weight": "scale_input", "weight_scale": "input_scale"}


def to_scaled(state, suffix, shape=()):
    """A file as ComfyUI writes it: the linears of blocks as fp8 times a factor, and one for their input."""
    out = {"scaled_fp8": torch.zeros(2, dtype=FP8)} if suffix == "scale_weight" else {}
    for name, value in state.items():
        if "blocks." in name and value.ndim == 2:
            layer, scale = name.removesuffix(".weight"), value.abs().max() / 448
            out[name] = (value / scale).to(FP8)
            out[f"{layer}.{suffix}"] = scale.reshape(shape)
            out[f"{layer}.{INPUT_SUFFIX[suffix]}"] = torch.ones(shape)
        else:
            out[name] = value
    return out


def unscaled(state):
    """The values that `to_scaled` leaves."""
    values = {}
    for name, value in state.items():
        scale = value.abs().max() / 448
        linear = "blocks." in name and value.ndim == 2
        values[name] = (value / scale).to(FP8).float() * scale if linear else value
    return values


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
def test_scaled_fp8_files_are_dequantised(tiny_files, tmp_path, suffix, shape):
    state = load_file(tiny_files.dit)
    scaled = {f"model.diffusion_model.{k}": v for k, v in to_scaled(state, suffix, shape).items()}
    save_file(scaled, tmp_path / "fp8.safetensors")
    model = load_transformer(tmp_path / "fp8.safetensors", **CPU)
    for name, value in unscaled(state).items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-6, atol=0)


def test_scaled_fp8_in_diffusers_names_keeps_a_factor_for_each_part(tiny_files, tmp_path):
    state = load_file(tiny_files.dit_diffusers)
    state["transformer_blocks.0.attn.to_k.weight"] *= 7
    save_file(to_scaled(state, "weight_scale"), tmp_path / "fp8.safetensors")
    expected = bfl_names.bfl_transformer(unscaled(state), tiny.DOUBLE, tiny.SINGLE)[f"{QKV}.weight"]
    plain = load_transformer(tmp_path / "fp8.safetensors", **CPU)
    kept = load_transformer(tmp_path / "fp8.safetensors", quantization="fp8_scaled", **CPU)
    for weight in (plain.state_dict()[f"{QKV}.weight"], kept.get_submodule(QKV).dequantised(torch.float32)):
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_files_cast_to_fp8(tiny_files, tmp_path, dtype):
    state = {name: value.to(dtype) for name, value in load_file(tiny_files.dit).items()}
    save_file(state, tmp_path / "fp8.safetensors")
    model = load_transformer(tmp_path / "fp8.safetensors", **CPU)
    assert all(torch.equal(model.state_dict()[name], value.float()) for name, value in state.items())


@pytest.mark.parametrize("mode", ["fp8", "fp8_scaled", "fp8_fast", "int8"])
def test_what_the_file_has_in_fp8_is_kept(tiny_files, tmp_path, mode):
    state = load_file(tiny_files.dit)
    state[f"{QKV}.weight"] = state[f"{QKV}.weight"].to(FP8)
    save_file(state, tmp_path / "fp8.safetensors")
    layer = load_transformer(tmp_path / "fp8.safetensors", quantization=mode, **CPU).get_submodule(QKV)
    assert layer.scale is None
    assert torch.equal(layer.weight.view(torch.uint8), state[f"{QKV}.weight"].view(torch.uint8))


@pytest.mark.parametrize(("mode", "dtype"), [("nf4", torch.uint8), ("int8_fast", torch.int8)])
def test_fp8_is_left_for_what_another_form_is_for(tiny_files, tmp_path, mode, dtype):
    """4 bits are asked for to save memory, and products of whole numbers take no other number."""
    state = load_file(tiny_files.dit)
    save_file(to_scaled(state, "scale_weight"), tmp_path / "fp8.safetensors")
    layer = load_transformer(tmp_path / "fp8.safetensors", quantization=mode, **CPU).get_submodule(QKV)
    expected, bound = unscaled(state)[f"{QKV}.weight"], {"nf4": 0.11, "int8_fast": 0.02}[mode]
    assert layer.weight.dtype == dtype
    assert (layer.dequantised(torch.float32) - expected).norm() < bound * expected.norm()


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
def test_scaled_fp8_files_are_multiplied_as_they_are(tiny_files, tmp_path, suffix):
    state = load_file(tiny_files.dit)
    save_file(to_scaled(state, suffix), tmp_path / "fp8.safetensors")
    layer = load_transformer(tmp_path / "fp8.safetensors", quantization="fp8_fast", **CPU).get_submodule(QKV)
    assert type(layer) is ProductLinear
    x, weight = torch.randn(5, 64), unscaled(state)[f"{QKV}.weight"]
    expected = x @ weight.t() + state[f"{QKV}.bias"]
    assert torch.equal(layer.dequantised(torch.float32), weight)
    assert (layer(x) - expected).norm() < 0.04 * expected.norm()


def test_other_quantisations_are_refused(tiny_files, tmp_path):
    state = load_file(tiny_files.dit)
    state[f"{QKV}.weight"] = torch.zeros(192, 64, dtype=torch.int8)
    state[f"{QKV}.weight_scale"] = torch.ones(192, 1)
    save_file(state, tmp_path / "int8.safetensors")
    with pytest.raises(
        UserError, match=r"int8.safetensors is quantised in a way .*torch.int8. Use the file in bf"
    ):
        load_transformer(tmp_path / "int8.safetensors", **CPU)


def test_edit_of_a_file_in_fp8(tiny_files, tmp_path):
    state = load_file(tiny_files.dit)
    save_file(to_scaled(state, "scale_weight"), tmp_path / "fp8.safetensors")
    model = load_transformer(tmp_path / "fp8.safetensors", quantization="fp8_scaled", edit=edit_qkv, **CPU)
    edited = model.get_submodule(QKV).dequantised(torch.float32)
    torch.testing.assert_close(edited, unscaled(state)[f"{QKV}.weight"] + 1, rtol=0.07, atol=0)
    proj = model.get_submodule("double_blocks.0.img_attn.proj").dequantised(torch.float32)
    torch.testing.assert_close(
        proj, unscaled(state)["double_blocks.0.img_attn.proj.weight"], rtol=1e-6, atol=0
    )
