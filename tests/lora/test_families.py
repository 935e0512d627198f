"""Families with names of their own, and parts beyond plain LoRA, against peft and diffusers."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import FluxKontextPipeline
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor

from tests.lora.models import CONFIG
from tests.lora.reference import (
    DIFFUSERS_MODULES,
    assert_same_change,
    base_weights,
    diffusers_model,
    merged_by_us,
    randomise_adapter,
    read,
    renamed,
    save,
)
from tests.lora.test_files import fused, peft_model


def flat(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PEFT keys in kohya's spelling."""
    out = {}
    for key, tensor in tensors.items():
        stem, _, part = key.partition(".lora_")
        part = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[part]
        out[f"{prefix}{stem.replace('.', '_')}.{part}"] = tensor
        out[f"{prefix}{stem.replace('.', '_')}.alpha"] = torch.tensor(6.0)
    return out


@pytest.mark.parametrize(
    ("prefix", "family"),
    [
        ("lora_unet_", "kohya with diffusers names"),
        ("lora_transformer_", "OneTrainer"),
        ("lycoris_", "LyCORIS"),
    ],
)
def test_flattened_diffusers_names(tmp_path: Path, prefix: str, family: str):
    model = peft_model(lora_alpha=6)
    adapter = read(save(tmp_path / "a.safetensors", flat(prefix, get_peft_model_state_dict(model))))
    assert adapter.family == family and not adapter.unmatched
    assert_same_change(merged_by_us(adapter), fused(model))


def test_onetrainer_is_read_alike_by_diffusers(tmp_path: Path):
    """Of a block's modules, diffusers' converter knows the attention ones only."""
    names = [n for n in DIFFUSERS_MODULES if ".attn." in n or "blocks" not in n]
    model = diffusers_model()
    model.add_adapter(
        LoraConfig(r=4, lora_alpha=6, target_modules="|".join(n.replace(".", r"\.") for n in names))
    )
    randomise_adapter(model)
    tensors = flat("lora_transformer_", get_peft_model_state_dict(model))
    tensors["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.zeros(1, 4)
    tensors["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"] = torch.zeros(4, 1)
    tensors["lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha"] = torch.tensor(1.0)
    path = save(tmp_path / "a.safetensors", tensors)
    adapter = read(path)
    assert len(adapter.skipped) == 3
    other = diffusers_model()
    other.load_lora_adapter(FluxKontextPipeline.lora_state_dict(path), prefix="transformer")
    assert_same_change(merged_by_us(adapter), fused(other))


def xlabs(prefix: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    width = CONFIG.width
    shapes = {
        f"double_blocks.{i}.processor.qkv_lora{s}": (3 * width, width) for i in range(2) for s in (1, 2)
    }
    shapes |= {f"double_blocks.{i}.processor.proj_lora{s}": (width, width) for i in range(2) for s in (1, 2)}
    shapes |= {"single_blocks.1.processor.qkv_lora": (3 * width, width)}
    shapes |= {"single_blocks.0.processor.proj_lora": (width, 5 * width)}
    tensors = {}
    for name, (rows, columns) in shapes.items():
        tensors[f"{prefix}{name}.down.weight"] = torch.randn(4, columns, generator=generator)
        tensors[f"{prefix}{name}.up.weight"] = torch.randn(rows, 4, generator=generator)
    return tensors


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_xlabs_is_read_alike_by_diffusers(tmp_path: Path, prefix: str):
    path = save(tmp_path / "a.safetensors", xlabs(prefix))
    adapter = read(path)
    assert adapter.family == "XLabs" and len(adapter.modules) == 10 and not adapter.unmatched
    model = diffusers_model()
    model.load_lora_adapter(FluxKontextPipeline.lora_state_dict(path), prefix="transformer")
    assert assert_same_change(merged_by_us(adapter), fused(model)) == 10


def test_an_xlabs_projection_of_the_attention_alone(tmp_path: Path):
    """linear2 reads attention and MLP; the adapter's inputs are the attention's, the first ones."""
    stem = "single_blocks.0.processor.proj_lora"
    down, up = torch.randn(4, CONFIG.width), torch.randn(CONFIG.width, 4)
    tensors = {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
    merged = merged_by_us(read(save(tmp_path / "a.safetensors", tensors)))
    expected = base_weights()
    expected["single_blocks.0.linear2.weight"][:, : CONFIG.width] += up @ down
    assert_same_change(merged, expected)


def test_dora_of_peft_on_diffusers_names(tmp_path: Path):
    model = peft_model(use_dora=True)
    tensors = {f"transformer.{k}": v for k, v in get_peft_model_state_dict(model).items()}
    assert any("lora_magnitude_vector" in k for k in tensors)
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 6})}
    expected = fused(model)
    adapter = read(save(tmp_path / "a.safetensors", tensors, metadata))
    assert adapter.kinds == ["DoRA"] and not adapter.unmatched
    assert_same_change(merged_by_us(adapter), expected)

    def aitoolkit(key: str) -> str:
        return key.replace("lora_magnitude_vector.weight", "magnitude").replace(
            "lora_magnitude_vector", "magnitude"
        )

    adapter = read(save(tmp_path / "b.safetensors", renamed(tensors, aitoolkit), metadata))
    assert adapter.kinds == ["DoRA"] and not adapter.unmatched
    assert_same_change(merged_by_us(adapter), expected)


@pytest.mark.parametrize("prefix", ["diffusion_model.", ""])
def test_full_differences_and_norms(tmp_path: Path, prefix: str):
    """ComfyUI's spellings: .diff, .diff_b, .w_norm and .set_weight; a norm by its module or its tensor."""
    weights = base_weights()
    block = "double_blocks.0"
    tensors = {
        f"{block}.img_attn.qkv.diff": torch.randn(192, 64),
        f"{block}.img_attn.qkv.diff_b": torch.randn(192),
        f"{block}.txt_mlp.2.set_weight": torch.randn(64, 256),
        f"{block}.img_attn.norm.query_norm.w_norm": torch.randn(32),
        f"{block}.img_attn.norm.key_norm.scale.diff": torch.randn(32),
        "single_blocks.1.norm.key_norm.scale.set_weight": torch.randn(32),
    }
    expected = weights | {
        f"{block}.img_attn.qkv.weight": weights[f"{block}.img_attn.qkv.weight"]
        + tensors[f"{block}.img_attn.qkv.diff"],
        f"{block}.img_attn.qkv.bias": weights[f"{block}.img_attn.qkv.bias"]
        + tensors[f"{block}.img_attn.qkv.diff_b"],
        f"{block}.txt_mlp.2.weight": tensors[f"{block}.txt_mlp.2.set_weight"],
        f"{block}.img_attn.norm.query_norm.scale": weights[f"{block}.img_attn.norm.query_norm.scale"]
        + tensors[f"{block}.img_attn.norm.query_norm.w_norm"],
        f"{block}.img_attn.norm.key_norm.scale": weights[f"{block}.img_attn.norm.key_norm.scale"]
        + tensors[f"{block}.img_attn.norm.key_norm.scale.diff"],
        "single_blocks.1.norm.key_norm.scale": tensors["single_blocks.1.norm.key_norm.scale.set_weight"],
    }
    adapter = read(save(tmp_path / "a.safetensors", renamed(tensors, lambda k: prefix + k)))
    assert adapter.kinds == ["full difference"] and not adapter.unmatched
    assert assert_same_change(merged_by_us(adapter), expected) == 6


def test_an_adapter_stored_twice_counts_once(tmp_path: Path):
    model = peft_model(lora_alpha=6)
    tensors = get_peft_model_state_dict(model)
    twice = flat("lora_unet_", tensors) | {f"transformer.{k}": v.clone() for k, v in tensors.items()}
    twice |= {
        f"transformer.{n.removesuffix('.lora_A.weight')}.alpha": torch.tensor(6.0)
        for n in tensors
        if "_A." in n
    }
    adapter = read(save(tmp_path / "a.safetensors", twice))
    assert_same_change(merged_by_us(adapter), fused(model))
    assert len(adapter.unmatched) == 3 * len(tensors) / 2
