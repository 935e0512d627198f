import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxKontextPipeline
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from kontext.cli import main
from kontext.lora.adapter import LoraLinear
from kontext.lora.deltas import LowRank
from kontext.lora.formats import Format, format_lora
from tests.lora.models import CONFIG
from tests.lora.reference import assert_same_change, bfl_weights, diffusers_model, merged_by_us, read, save
from tests.lora.test_files import dense, fused, peft_model, trained_modules


def changes(modules: dict[str, LoraLinear]) -> dict[str, LowRank]:
    return {
        name: LowRank(m.lora_down.weight.detach(), m.lora_up.weight.detach(), m.scale)
        for name, m in modules.items()
    }


def written(path: Path, modules: dict[str, LoraLinear], format: Format) -> dict[str, Tensor]:
    tensors = format_lora(changes(modules), format, CONFIG, torch.float32)
    save(path, tensors, {})
    return tensors


@pytest.mark.parametrize(
    ("format", "family"),
    [
        ("kohya", "kohya/musubi"),
        ("diffusers", "diffusers/PEFT"),
        ("bfl", "BFL names"),
        ("comfy", "BFL names"),
    ],
)
def test_every_format_comes_back(tmp_path: Path, format: Format, family: str):
    modules = trained_modules(include_patterns=[".*_in", r"final_layer\..*"])
    written(tmp_path / "a.safetensors", modules, format)
    adapter = read(tmp_path / "a.safetensors")
    assert adapter.family == family and not adapter.unmatched
    assert_same_change(merged_by_us(adapter), dense(modules))


def test_the_names_of_comfy_and_bfl(tmp_path: Path):
    modules = trained_modules()
    names = written(tmp_path / "a.safetensors", modules, "comfy")
    assert "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight" in names
    names = written(tmp_path / "a.safetensors", modules, "bfl")
    assert "single_blocks.1.linear1.lora_B.weight" in names and "single_blocks.1.linear1.alpha" in names


def test_diffusers_loads_the_diffusers_format(tmp_path: Path, tiny_files):
    """All modules, at any width, the final modulation with its swapped halves too."""
    modules = trained_modules(include_patterns=[".*_in", r"final_layer\..*", r".*mod\.lin"])
    written(tmp_path / "a.safetensors", modules, "diffusers")
    pipeline = FluxKontextPipeline.from_pretrained(tiny_files.pipeline)
    pipeline.load_lora_weights(tmp_path / "a.safetensors")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert assert_same_change(dense(modules), bfl_weights(pipeline.transformer)) == len(modules)


def test_a_block_diagonal_up_is_split_into_its_blocks(tmp_path: Path):
    """q, k and v at rank 2, 3 and 0, fused: each part comes out at its own rank, an empty one not at all."""
    up = torch.zeros(3 * CONFIG.width, 5)
    up[:64, :2], up[64:128, 2:] = torch.randn(64, 2), torch.randn(64, 3)
    change = LowRank(torch.randn(5, CONFIG.width), up, 0.5)
    tensors = format_lora({"double_blocks.0.img_attn.qkv": change}, "diffusers", CONFIG, torch.float32)
    ranks = {k.split(".")[-3]: v.shape[0] for k, v in tensors.items() if "lora_A" in k}
    assert ranks == {"to_q": 2, "to_k": 3}
    model = diffusers_model()
    model.load_lora_adapter(dict(tensors), prefix="transformer")
    adapter = read(save(tmp_path / "a.safetensors", tensors))
    assert_same_change(merged_by_us(adapter), fused(model))


@pytest.mark.parametrize("format", ["kohya", "diffusers", "bfl", "comfy"])
def test_a_dora_goes_through_every_format(tmp_path: Path, format: Format, monkeypatch):
    """From PEFT's file of diffusers' split layers; the one in diffusers' names is loaded by diffusers and PEFT again."""
    model = peft_model(use_dora=True)
    tensors = {f"transformer.{k}": v for k, v in get_peft_model_state_dict(model).items()}
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 6})}
    save(tmp_path / "peft.safetensors", tensors, metadata)
    expected = fused(model)
    monkeypatch.setattr("kontext.commands.merge_loras.config_for", lambda paths: CONFIG)
    out = tmp_path / "out.safetensors"
    arguments = ["merge", "--lora-weight", str(tmp_path / "peft.safetensors"), "--output", str(out)]
    assert main([*arguments, "--format", format]) == 0
    adapter = read(out)
    assert adapter.kinds == ["DoRA"] and not adapter.unmatched
    assert_same_change(merged_by_us(adapter), expected)
    if format == "diffusers":
        again = diffusers_model()
        again.load_lora_adapter(load_file(out), prefix="transformer")
        assert_same_change(fused(again), expected)
