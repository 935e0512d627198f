"""Loading a transformer: every layout must compute what diffusers computes."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from kontext.checkpoints import load_transformer, open_source, transformer_config
from kontext.checkpoints.transformer import rope_axes
from kontext.errors import UserError
from kontext.quant import FP8, ProductLinear, QuantisedLinear, values
from tests import bfl_names, tiny
from tests.compare import relative_error

LAYOUTS = ("dit", "dit_prefixed", "dit_diffusers", "dit_sharded", "pipeline")
CPU = {"device": "cpu", "dtype": torch.float32}
MODES = ("fp8", "fp8_scaled", "fp8_fast", "int8", "int8_fast", "nf4")
QKV = "double_blocks.0.img_attn.qkv"


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


# ---- quantising while loading ----


@pytest.mark.parametrize(
    ("mode", "bound"),
    [
        ("fp8", 0.15),
        ("fp8_scaled", 0.12),
        ("fp8_fast", 0.2),
        ("int8", 0.03),
        ("int8_fast", 0.07),
        ("nf4", 0.5),
    ],
)
def test_quantised_models_compute_nearly_the_same(tiny_files, inputs, expected, mode, bound):
    model = load_transformer(tiny_files.dit_diffusers, quantization=mode, **CPU)
    error = (ours(model, inputs) - expected).norm() / expected.norm()
    assert 1e-4 < error < bound


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_quantised(tiny_files, mode, dtype):
    """The blocks' linears on tokens; norms, modulation, embedders and final layer stay in the compute type."""
    model = load_transformer(tiny_files.dit, device="cpu", dtype=dtype, quantization=mode)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantisedLinear)}
    double = ("img_attn.qkv", "img_attn.proj", "img_mlp.0", "img_mlp.2")
    expected = {f"double_blocks.{i}.{n}" for i in range(2) for n in double}
    expected |= {name.replace("img_", "txt_") for name in expected}
    expected |= {f"single_blocks.{i}.linear{n}" for i in range(2) for n in (1, 2)}
    assert layers.keys() == expected
    inside = {f"{name}.{kind}" for name in layers for kind in ("weight", "scale")}
    assert {t.dtype for name, t in model.state_dict().items() if name not in inside} == {dtype}
    kept = {"nf4": torch.uint8, "int8": torch.int8, "int8_fast": torch.int8}.get(mode, FP8)
    assert {layer.weight.dtype for layer in layers.values()} == {kept}
    assert all((type(layer) is ProductLinear) == mode.endswith("_fast") for layer in layers.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", MODES)
def test_a_gpu_holds_one_tensor_beside(tmp_path, mode, monkeypatch):
    monkeypatch.setattr(
        values, "CHUNK", 2**18
    )  # this model's weights are smaller than what is rounded at once
    state = tiny.make_transformer(seed=0, width=512, blocks=6).state_dict()
    save_file(bfl_names.bfl_transformer(state, 6, 6), tmp_path / "dit.safetensors")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load_transformer(
        tmp_path / "dit.safetensors", device="cuda", dtype=torch.bfloat16, quantization=mode
    )
    kept, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    largest = max(tensor.numel() for tensor in state.values()) * 4
    assert peak < kept + 4 * largest < sum(t.numel() for t in model.state_dict().values()) * 4


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
