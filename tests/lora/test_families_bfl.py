"""Files on BFL's names, dotted: fal, raw PEFT, ComfyUI and others, against peft and diffusers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxKontextPipeline
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

from kontext.lora.files import read_adapter, save_lora
from kontext.model.transformer import FLUX
from tests.lora.effective import adapted_bfl, our_model
from tests.lora.models import product, relative_error
from tests.lora.reference import (
    BFL_MODULES,
    assert_same_change,
    merged_by_us,
    randomise_adapter,
    read,
    renamed,
    save,
)
from tests.lora.test_files import full_size_names, trained_modules

PEFT = {
    "lora": lambda **k: LoraConfig(r=4, lora_alpha=6, **k),
    "rslora": lambda **k: LoraConfig(r=4, lora_alpha=6, use_rslora=True, **k),
    "dora": lambda **k: LoraConfig(r=4, lora_alpha=6, use_dora=True, **k),
    "bias": lambda **k: LoraConfig(r=4, lora_alpha=6, lora_bias=True, **k),
    "loha": lambda **k: LoHaConfig(r=4, alpha=6, **k),
    "lokr": lambda **k: LoKrConfig(r=4, alpha=6, decompose_factor=4, **k),
}


def peft_ours(kind: str, names: list[str] = BFL_MODULES) -> Any:
    model = get_peft_model(our_model(), PEFT[kind](target_modules=names))
    randomise_adapter(model)
    return model


@pytest.mark.parametrize("kind", PEFT)
def test_a_peft_folder(tmp_path: Path, kind: str):
    """`save_pretrained`: alpha stands in adapter_config.json."""
    model = peft_ours(kind)
    model.save_pretrained(tmp_path)
    adapter = read(tmp_path)
    assert adapter.family == "fal" and not adapter.unmatched
    expected = adapted_bfl(model.get_base_model(), BFL_MODULES)
    assert assert_same_change(merged_by_us(adapter), expected) >= len(BFL_MODULES)


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model.", "base_model.model."])
@pytest.mark.parametrize("down", ["lora_A", "lora_down"])
def test_dotted_bfl_names(tmp_path: Path, prefix: str, down: str):
    model = peft_ours("lora")
    up = {"lora_A": "lora_B", "lora_down": "lora_up"}[down]

    def rename(key: str) -> str:
        stem = key.removeprefix("base_model.model.").replace("lora_A", down)
        return prefix + stem.replace("lora_B", up)

    tensors = renamed(get_peft_model_state_dict(model), rename)
    tensors |= {f"{prefix}{name}.alpha": torch.tensor(6.0) for name in BFL_MODULES}
    adapter = read(save(tmp_path / "a.safetensors", tensors))
    assert adapter.family == ("fal" if prefix.startswith("base") else "BFL names") and not adapter.unmatched
    assert_same_change(merged_by_us(adapter), adapted_bfl(model.get_base_model(), BFL_MODULES))


def test_half_dotted_names_of_musubis_converter(tmp_path: Path):
    """`convert_lora.py --target other` leaves underscores: diffusion_model.double_blocks.0.img_attn_qkv."""
    save_lora(tmp_path / "a.safetensors", modules := trained_modules())

    def rename(key: str) -> str:
        blocks, _, rest = key.removeprefix("lora_unet_").partition("_blocks_")
        index, _, name = rest.partition("_")
        name = name.replace("lora_down", "lora_A").replace("lora_up", "lora_B")
        return f"diffusion_model.{blocks}_blocks.{index}.{name}"

    adapter = read(save(tmp_path / "b.safetensors", renamed(load_file(tmp_path / "a.safetensors"), rename)))
    assert len(adapter.modules) == len(modules) and not adapter.unmatched
    assert_same_change(merged_by_us(adapter), merged_by_us(read(tmp_path / "a.safetensors")))


def test_fal_at_full_size_is_read_alike_by_diffusers(tmp_path: Path):
    """diffusers wants every module of the real model, modulation and final layer too."""
    generator = torch.Generator().manual_seed(0)
    shapes = {n: (o, i) for n, (o, i) in full_size_shapes().items()}
    tensors = {}
    for name, (rows, columns) in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(1, columns, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, 1, generator=generator)
    path = save(tmp_path / "a.safetensors", tensors)
    theirs = FluxKontextPipeline.lora_state_dict(path)
    adapter = read_adapter(path, FLUX)
    assert adapter.family == "fal" and len(adapter.modules) == len(shapes)
    names = full_size_names() | {"final_layer.linear": ["proj_out"]}
    for i in range(19):
        names[f"double_blocks.{i}.img_mod.lin"] = [f"transformer_blocks.{i}.norm1.linear"]
        names[f"double_blocks.{i}.txt_mod.lin"] = [f"transformer_blocks.{i}.norm1_context.linear"]
    for i in range(38):
        names[f"single_blocks.{i}.modulation.lin"] = [f"single_transformer_blocks.{i}.norm.linear"]
    x = torch.randn(15360, generator=generator)
    for bfl, parts in names.items():
        downs = [theirs.pop(f"transformer.{n}.lora_A.weight") for n in parts]
        ups = [theirs.pop(f"transformer.{n}.lora_B.weight") for n in parts]
        expected = torch.cat([b @ (a @ x[: a.shape[1]]) for a, b in zip(downs, ups, strict=True)])
        (delta,) = adapter.deltas[f"{bfl}.weight"]
        assert relative_error(product(delta.change, x[: delta.change.shape[1]]), expected) < 1e-5
    assert not theirs


def full_size_shapes() -> dict[str, tuple[int, int]]:
    shapes = {"final_layer.linear": (64, 3072)}
    for i in range(19):
        for s in ("img", "txt"):
            b = f"double_blocks.{i}.{s}"
            shapes |= {f"{b}_attn.qkv": (9216, 3072), f"{b}_attn.proj": (3072, 3072)}
            shapes |= {
                f"{b}_mlp.0": (12288, 3072),
                f"{b}_mlp.2": (3072, 12288),
                f"{b}_mod.lin": (18432, 3072),
            }
    for i in range(38):
        b = f"single_blocks.{i}"
        shapes |= {f"{b}.linear1": (21504, 3072), f"{b}.linear2": (3072, 15360)}
        shapes |= {f"{b}.modulation.lin": (9216, 3072)}
    return shapes
