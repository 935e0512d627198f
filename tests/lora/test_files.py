"""kohya/musubi and diffusers/PEFT: from our file to theirs and back, against diffusers and peft."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxKontextPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from kontext.errors import UserError
from kontext.lora.adapter import LoraLinear, attach
from kontext.lora.files import load_weights, read_adapter, save_lora
from kontext.model.transformer import FLUX
from tests.lora.models import CONFIG, make_transformer, meta_transformer, product, relative_error
from tests.lora.reference import (
    DIFFUSERS_MODULES,
    assert_same_change,
    base_weights,
    bfl_weights,
    diffusers_model,
    merged_by_us,
    randomise_adapter,
    read,
    save,
)


def trained_modules(seed: int = 5, alpha: float = 3.0, **patterns: list[str]) -> dict[str, LoraLinear]:
    """Adapters on a small model with the reference's base weights, as after training."""
    model = make_transformer()
    model.load_state_dict(base_weights())
    modules = attach(model, rank=4, alpha=alpha, seed=0, **patterns)
    for i, module in enumerate(modules.values()):
        generator = torch.Generator().manual_seed(seed + i)
        nn.init.normal_(module.lora_up.weight, generator=generator)
    return modules


def dense(modules: dict[str, LoraLinear]) -> dict[str, Tensor]:
    """Base weights plus what the modules add, by their own forward pass."""
    weights = base_weights()
    for name, module in modules.items():
        eye = torch.eye(module.base.in_features)
        with torch.no_grad():
            weights[f"{name}.weight"] = (module(eye) - module.base.bias).T
    return weights


def test_our_file_comes_back_as_it_was(tmp_path: Path):
    modules = trained_modules()
    save_lora(tmp_path / "a.safetensors", modules, metadata={"ss_steps": "3"})
    adapter = read(tmp_path / "a.safetensors")
    assert adapter.family == "kohya/musubi" and adapter.kinds == ["LoRA"]
    assert sorted(adapter.modules) == sorted(modules) and not adapter.unmatched and not adapter.skipped
    assert adapter.metadata["ss_steps"] == "3"
    assert assert_same_change(merged_by_us(adapter), dense(modules)) == len(modules)


def test_our_file_holds_the_published_names(tmp_path: Path):
    save_lora(tmp_path / "a.safetensors", trained_modules(alpha=2.5), dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "a.safetensors")
    assert len(tensors) == 3 * (8 * CONFIG.double_blocks + 2 * CONFIG.single_blocks)
    stem = "lora_unet_double_blocks_1_txt_mlp_2"
    assert tensors[f"{stem}.lora_down.weight"].shape == (4, 256)
    assert tensors[f"{stem}.lora_up.weight"].shape == (64, 4)
    assert tensors[f"{stem}.alpha"].shape == () and tensors[f"{stem}.alpha"].item() == 2.5
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert "lora_unet_single_blocks_0_linear1.lora_up.weight" in tensors


def test_our_file_loads_in_a_diffusers_pipeline(tmp_path: Path, tiny_files):
    # diffusers' converter knows linear1 at width 3072 only: test_every_module_at_full_size has it.
    modules = trained_modules(exclude_patterns=[r".*linear1"])
    save_lora(tmp_path / "a.safetensors", modules)
    pipeline = FluxKontextPipeline.from_pretrained(tiny_files.pipeline)
    pipeline.load_lora_weights(tmp_path / "a.safetensors")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    changed = assert_same_change(dense(modules), bfl_weights(pipeline.transformer))
    assert changed == len(modules) == 8 * CONFIG.double_blocks + CONFIG.single_blocks


def test_every_module_at_full_size_is_read_alike_by_diffusers(tmp_path: Path):
    modules = attach(meta_transformer(), rank=2, alpha=1.0, seed=0, device="cpu")
    generator = torch.Generator().manual_seed(1)
    for module in modules.values():
        nn.init.normal_(module.lora_up.weight, generator=generator)
    save_lora(tmp_path / "a.safetensors", modules)
    theirs = FluxKontextPipeline.lora_state_dict(tmp_path / "a.safetensors")
    adapter = read_adapter(tmp_path / "a.safetensors", FLUX)
    assert len(adapter.modules) == 228

    x = torch.randn(12288 + 3072, generator=generator)
    with torch.no_grad():
        for bfl, names in full_size_names().items():
            parts = [theirs.pop(f"transformer.{n}.lora_A.weight") for n in names]
            ups = [theirs.pop(f"transformer.{n}.lora_B.weight") for n in names]
            expected = torch.cat([b @ (a @ x[: a.shape[1]]) for a, b in zip(parts, ups, strict=True)])
            (delta,) = adapter.deltas[f"{bfl}.weight"]
            assert relative_error(product(delta.change, x[: delta.change.shape[1]]), expected) < 1e-5
    assert not theirs


def full_size_names() -> dict[str, list[str]]:
    """The 228 modules of the real model and their diffusers parts, written out."""
    names: dict[str, list[str]] = {}
    for i in range(19):
        b, d = f"double_blocks.{i}", f"transformer_blocks.{i}"
        names[f"{b}.img_attn.qkv"] = [f"{d}.attn.to_{c}" for c in "qkv"]
        names[f"{b}.txt_attn.qkv"] = [f"{d}.attn.add_{c}_proj" for c in "qkv"]
        names[f"{b}.img_attn.proj"] = [f"{d}.attn.to_out.0"]
        names[f"{b}.txt_attn.proj"] = [f"{d}.attn.to_add_out"]
        for ours, theirs in (("img_mlp", "ff"), ("txt_mlp", "ff_context")):
            names[f"{b}.{ours}.0"] = [f"{d}.{theirs}.net.0.proj"]
            names[f"{b}.{ours}.2"] = [f"{d}.{theirs}.net.2"]
    for i in range(38):
        d = f"single_transformer_blocks.{i}"
        names[f"single_blocks.{i}.linear1"] = [f"{d}.attn.to_{c}" for c in "qkv"] + [f"{d}.proj_mlp"]
        names[f"single_blocks.{i}.linear2"] = [f"{d}.proj_out"]
    return names


def peft_model(**settings):
    """A diffusers model with random LoRA on all kinds of modules, ranks mixed."""
    model = diffusers_model()
    options = {"r": 4, "lora_alpha": 6, "target_modules": DIFFUSERS_MODULES} | settings
    model.add_adapter(LoraConfig(**options))
    randomise_adapter(model)
    return model


def fused(model) -> dict[str, Tensor]:
    """A peft-adapted diffusers model's weights with the adapter merged by peft."""
    model.fuse_lora()
    model.unload_lora()
    return bfl_weights(model)


MIXED = {
    "rank_pattern": {"to_k": 2, "transformer_blocks.1.ff.net.2": 7},
    "alpha_pattern": {"to_k": 3, "transformer_blocks.1.ff.net.2": 1},
}


@pytest.mark.parametrize("settings", [{}, MIXED, {"use_rslora": True}], ids=["plain", "mixed", "rslora"])
def test_a_diffusers_file_with_settings_in_its_metadata(tmp_path: Path, settings):
    model = peft_model(**settings)
    model.save_lora_adapter(tmp_path, weight_name="x.safetensors")
    tensors = {f"transformer.{k}": v for k, v in load_file(tmp_path / "x.safetensors").items()}
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        own = json.loads(file.metadata()["lora_adapter_metadata"])
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in own.items()})}
    adapter = read(save(tmp_path / "a.safetensors", tensors, metadata))
    assert adapter.family == "diffusers/PEFT" and not adapter.unmatched
    assert assert_same_change(merged_by_us(adapter), fused(model)) > 15


def test_the_pipelines_own_file(tmp_path: Path):
    model = peft_model(lora_alpha=4)
    FluxKontextPipeline.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(model))
    assert_same_change(merged_by_us(read(tmp_path)), fused(model))


@pytest.mark.parametrize("prefix", ["", "transformer.", "base_model.model."])
@pytest.mark.parametrize("infix", ["", "default."])
def test_prefixes_of_peft(tmp_path: Path, prefix: str, infix: str):
    model = peft_model(lora_alpha=4)
    tensors = get_peft_model_state_dict(model)
    named = {f"{prefix}{k.replace('.weight', f'.{infix}weight')}": v for k, v in tensors.items()}
    adapter = read(save(tmp_path / "a.safetensors", named))
    assert adapter.family in ("diffusers/PEFT", "PEFT") and not adapter.unmatched
    assert_same_change(merged_by_us(adapter), fused(model))


SPELLINGS = {
    "lora_A.weight": "lora_B.weight",
    "lora_down.weight": "lora_up.weight",
    "lora_A": "lora_B",
    "lora.down.weight": "lora.up.weight",
    "lora_linear_layer.down.weight": "lora_linear_layer.up.weight",
}


@pytest.mark.parametrize("down", SPELLINGS)
def test_spellings_of_down_and_up(tmp_path: Path, down: str):
    model = peft_model(lora_alpha=4)
    tensors = {
        k.replace("lora_A.weight", down).replace("lora_B.weight", SPELLINGS[down]): v
        for k, v in get_peft_model_state_dict(model).items()
    }
    assert_same_change(merged_by_us(read(save(tmp_path / "a.safetensors", tensors))), fused(model))


def test_alpha_beside_diffusers_names(tmp_path: Path):
    model = peft_model(lora_alpha=6)
    tensors = {f"transformer.{k}": v for k, v in get_peft_model_state_dict(model).items()}
    downs = [k for k in tensors if k.endswith(".lora_A.weight")]
    tensors |= {k.replace(".lora_A.weight", ".alpha"): torch.tensor(6.0) for k in downs}
    adapter = read(save(tmp_path / "a.safetensors", tensors))
    assert not adapter.unmatched
    assert_same_change(merged_by_us(adapter), fused(model))


def test_peft_biases(tmp_path: Path):
    model = peft_model(lora_alpha=6, lora_bias=True)
    tensors = {f"transformer.{k}": v for k, v in get_peft_model_state_dict(model).items()}
    assert "transformer.proj_out.lora_B.bias" in tensors
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 6})}
    adapter = read(save(tmp_path / "a.safetensors", tensors, metadata))
    assert_same_change(merged_by_us(adapter), fused(model))


def test_a_lora_of_q_and_v_alone(tmp_path: Path):
    names = [f"transformer_blocks.0.attn.to_{c}" for c in "qv"]
    model = peft_model(lora_alpha=4, target_modules=names)
    adapter = read(save(tmp_path / "a.safetensors", get_peft_model_state_dict(model)))
    assert adapter.modules == ["double_blocks.0.img_attn.qkv"]
    assert assert_same_change(merged_by_us(adapter), fused(model)) == 1


def test_without_alpha_the_scale_is_one(tmp_path: Path):
    modules = trained_modules(alpha=4.0)
    save_lora(tmp_path / "a.safetensors", modules)
    tensors = {k: v for k, v in load_file(tmp_path / "a.safetensors").items() if not k.endswith("alpha")}
    adapter = read(save(tmp_path / "b.safetensors", tensors))
    assert_same_change(merged_by_us(adapter), dense(modules))


def test_training_goes_on_from_a_file(tmp_path: Path):
    modules = trained_modules(alpha=3.0)
    save_lora(tmp_path / "a.safetensors", modules)
    fresh = trained_modules(seed=50, alpha=1.0)
    assert load_weights(fresh, read(tmp_path / "a.safetensors")) == []
    assert_same_change(dense(fresh), dense(modules))


def test_training_goes_on_from_a_diffusers_file(tmp_path: Path):
    """Rank 4 in q, k and v each is rank 12 in qkv."""
    targets = [f"transformer_blocks.0.attn.to_{c}" for c in "qkv"]
    model = peft_model(lora_alpha=4, target_modules=targets)
    adapter = read(save(tmp_path / "a.safetensors", get_peft_model_state_dict(model)))
    ours = make_transformer()
    ours.load_state_dict(base_weights())
    modules = attach(ours, rank=12, alpha=5.0, seed=0)
    assert len(load_weights(modules, adapter)) == len(modules) - 1
    assert_same_change(dense(modules), fused(model))
    with pytest.raises(UserError, match="has rank 12 there and 4 here"):
        load_weights(trained_modules(), adapter)


def test_text_encoders_are_skipped(tmp_path: Path):
    modules = trained_modules()
    save_lora(tmp_path / "a.safetensors", modules)
    tensors = load_file(tmp_path / "a.safetensors")
    encoders = [
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q.alpha",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.lora_up.weight",
    ]
    adapter = read(save(tmp_path / "b.safetensors", tensors | {k: torch.zeros(2, 2) for k in encoders}))
    assert sorted(adapter.skipped) == sorted(encoders) and not adapter.unmatched
    with pytest.raises(UserError, match="only the text encoders"):
        read(save(tmp_path / "c.safetensors", {k: torch.zeros(2, 2) for k in encoders}))


def test_unmatched_keys_are_listed(tmp_path: Path):
    modules = trained_modules()
    save_lora(tmp_path / "a.safetensors", modules)
    strange = [
        "lora_unet_double_blocks_0_img_attn_zkv.lora_down.weight",
        "lora_unet_double_blocks_0_img_attn_qkv.lora_sideways.weight",
        "lora_unet_double_blocks_0_img_mod_lin.lora_down.weight",
    ]
    tensors = load_file(tmp_path / "a.safetensors") | {k: torch.zeros(4, 64) for k in strange}
    adapter = read(save(tmp_path / "b.safetensors", tensors))
    assert sorted(adapter.unmatched) == sorted(strange)
    assert len(adapter.modules) == len(modules)
