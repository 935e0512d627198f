"""Loading a transformer: every layout must compute what diffusers computes."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from kontext.checkpoints import load_transformer, open_source, transformer_config
from kontext.checkpoints.transformer import rope_axes
from kontext.errors import UserError
from kontext.model.latents import position_ids
from kontext.quant import FP8, EightBitLinear
from tests import bfl_names, tiny
from tests.compare import relative_error

LAYOUTS = ("dit", "dit_prefixed", "dit_diffusers", "dit_sharded", "pipeline")
CPU = {"device": "cpu", "dtype": torch.float32}
QKV = "double_blocks.0.img_attn.qkv"


@pytest.fixture(scope="module")
def inputs():
    """Two samples: a 4x6 target, a 4x4 reference, text of 5 tokens."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return SimpleNamespace(
        img=draw(2, 40, 64),
        img_ids=torch.cat((position_ids(4, 6), position_ids(4, 4, index=1))),
        txt=draw(2, 5, tiny.CONTEXT_WIDTH),
        txt_ids=torch.zeros(5, 3),
        t=torch.tensor([0.9, 0.25]),
        vector=draw(2, tiny.VECTOR_WIDTH),
        guidance=torch.tensor([2.5, 1.0]),
    )


@torch.no_grad()
def ours(model, x, guidance=True):
    strength = x.guidance if guidance else None
    return model(x.img, x.img_ids[None], x.txt, x.txt_ids[None], x.t, x.vector, strength)


@torch.no_grad()
def diffusers_output(folder, x, guidance=True):
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel.from_pretrained(folder)
    return model(
        hidden_states=x.img,
        encoder_hidden_states=x.txt,
        pooled_projections=x.vector,
        timestep=x.t,
        img_ids=x.img_ids,
        txt_ids=x.txt_ids,
        guidance=x.guidance if guidance else None,
    ).sample


@pytest.fixture(scope="module")
def expected(tiny_files, inputs):
    return diffusers_output(tiny_files.pipeline / "transformer", inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_agrees_with_diffusers(tiny_files, inputs, expected, layout):
    model = load_transformer(getattr(tiny_files, layout), **CPU)
    assert relative_error(ours(model, inputs), expected) < 1e-5


@pytest.mark.parametrize("layout", ["dit_no_guidance", "pipeline_no_guidance"])
def test_without_guidance(tiny_files, inputs, layout):
    expected = diffusers_output(tiny_files.pipeline_no_guidance / "transformer", inputs, guidance=False)
    model = load_transformer(getattr(tiny_files, layout), **CPU)
    assert not model.config.guidance
    assert relative_error(ours(model, inputs, guidance=False), expected) < 1e-5


def test_the_model_is_frozen_complete_and_of_the_dtype(tiny_files):
    model = load_transformer(tiny_files.dit, device="cpu", dtype=torch.bfloat16)
    tensors = list(model.parameters()) + list(model.buffers())
    assert {(t.dtype, t.device.type, t.requires_grad) for t in tensors} == {(torch.bfloat16, "cpu", False)}
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("head", "axes"),
    [(128, (16, 56, 56)), (64, (8, 28, 28)), (32, (4, 14, 14)), (24, (4, 10, 10)), (16, (4, 6, 6))],
)
def test_rope_axes(head, axes):
    assert rope_axes(head) == axes


def test_axes_of_config_json_count(tiny_files, tmp_path):
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel.from_pretrained(
        tiny_files.pipeline / "transformer", axes_dims_rope=(8, 8, 16)
    )
    model.save_pretrained(tmp_path)
    assert transformer_config(open_source(tmp_path, "transformer")).axes == (8, 8, 16)


# ---- files in fp8 ----


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


@pytest.mark.parametrize("mode", ["fp8", "fp8_scaled"])
def test_what_the_file_has_in_fp8_is_kept(tiny_files, tmp_path, mode):
    state = load_file(tiny_files.dit)
    state[f"{QKV}.weight"] = state[f"{QKV}.weight"].to(FP8)
    save_file(state, tmp_path / "fp8.safetensors")
    layer = load_transformer(tmp_path / "fp8.safetensors", quantization=mode, **CPU).get_submodule(QKV)
    assert layer.scale is None
    assert torch.equal(layer.weight.view(torch.uint8), state[f"{QKV}.weight"].view(torch.uint8))


def test_other_quantisations_are_refused(tiny_files, tmp_path):
    state = load_file(tiny_files.dit)
    state[f"{QKV}.weight"] = torch.zeros(192, 64, dtype=torch.int8)
    state[f"{QKV}.weight_scale"] = torch.ones(192, 1)
    save_file(state, tmp_path / "int8.safetensors")
    with pytest.raises(
        UserError, match=r"int8.safetensors is quantised in a way .*torch.int8. Use the file in bf"
    ):
        load_transformer(tmp_path / "int8.safetensors", **CPU)


# ---- quantising while loading ----


@pytest.mark.parametrize(("mode", "bound"), [("fp8", 0.15), ("fp8_scaled", 0.12)])
def test_quantised_models_compute_nearly_the_same(tiny_files, inputs, expected, mode, bound):
    model = load_transformer(tiny_files.dit_diffusers, quantization=mode, **CPU)
    error = (ours(model, inputs) - expected).norm() / expected.norm()
    assert 1e-4 < error < bound


def test_what_is_quantised(tiny_files):
    model = load_transformer(tiny_files.dit, quantization="fp8_scaled", **CPU)
    names = {name for name, module in model.named_modules() if isinstance(module, EightBitLinear)}
    double = ("img_attn.qkv", "img_attn.proj", "img_mlp.0", "img_mlp.2")
    expected = {f"double_blocks.{i}.{n}" for i in range(2) for n in double}
    expected |= {name.replace("img_", "txt_") for name in expected}
    expected |= {f"single_blocks.{i}.linear{n}" for i in range(2) for n in (1, 2)}
    assert names == expected


# ---- editing while loading ----


def edit_qkv(name, value):
    return value + 1 if name == f"{QKV}.weight" else value


@pytest.mark.parametrize("layout", ["dit", "dit_diffusers"])
def test_edit_sees_every_tensor_by_its_bfl_name(tiny_files, layout):
    seen = {}
    load_transformer(getattr(tiny_files, layout), edit=lambda n, v: seen.setdefault(n, v), **CPU)
    reference = load_file(tiny_files.dit)
    assert seen.keys() == reference.keys()
    assert all(torch.equal(seen[name], value) for name, value in reference.items())


@pytest.mark.parametrize("mode", [None, "fp8_scaled"])
def test_edit_comes_before_quantising(tiny_files, mode):
    model = load_transformer(tiny_files.dit, quantization=mode, edit=edit_qkv, **CPU)
    layer = model.get_submodule(QKV)
    weight = layer.dequantised(torch.float32) if mode else layer.weight
    expected = load_file(tiny_files.dit)[f"{QKV}.weight"] + 1
    torch.testing.assert_close(weight, expected, rtol=0.07 if mode else 0, atol=0)


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


# ---- wrong files ----


def test_all_faults_are_listed_at_once(tiny_files, tmp_path):
    state = load_file(tiny_files.dit)
    del state["single_blocks.1.linear2.bias"], state["time_in.in_layer.weight"]
    state["extra.weight"] = torch.zeros(1)
    state["txt_in.bias"] = torch.zeros(3)
    save_file(state, tmp_path / "broken.safetensors")
    with pytest.raises(UserError) as error:
        load_transformer(tmp_path / "broken.safetensors", **CPU)
    message = str(error.value)
    assert "2 missing: " in message and "single_blocks.1.linear2.bias" in message
    assert "time_in.in_layer.weight" in message and "1 unknown: extra.weight" in message
    assert "1 of another shape: txt_in.bias (3,) instead of (64,)" in message


def test_a_missing_part_is_named_as_in_the_file(tiny_files, tmp_path):
    state = load_file(tiny_files.dit_diffusers)
    del state["transformer_blocks.1.attn.to_v.weight"]
    save_file(state, tmp_path / "broken.safetensors")
    with pytest.raises(UserError, match=r"1 missing: transformer_blocks.1.attn.to_v.weight"):
        load_transformer(tmp_path / "broken.safetensors", **CPU)


def test_a_missing_tensor_that_tells_the_sizes(tiny_files, tmp_path):
    state = load_file(tiny_files.dit)
    del state["txt_in.weight"]
    save_file(state, tmp_path / "broken.safetensors")
    with pytest.raises(UserError, match=r"broken.safetensors is not complete: the tensor txt_in.weight is"):
        load_transformer(tmp_path / "broken.safetensors", **CPU)


def test_fill_and_control_models_are_refused(tiny_files, tmp_path):
    state = load_file(tiny_files.dit)
    state["img_in.weight"] = torch.zeros(64, 384)
    save_file(state, tmp_path / "fill.safetensors")
    with pytest.raises(UserError, match=r"takes 384 channels and gives 64: it is FLUX.1 Fill"):
        load_transformer(tmp_path / "fill.safetensors", **CPU)
