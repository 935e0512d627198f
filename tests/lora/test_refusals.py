"""Adapter files that are recognised and cannot be used."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kontext.errors import UserError
from tests.lora.reference import (
    read,
    save,
)


def tiny_lora(stem: str, rows: int = 64, columns: int = 64) -> dict[str, Tensor]:
    down, up = torch.randn(4, columns), torch.randn(rows, 4)
    return {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}


FOREIGN = {
    "Stable Diffusion XL": "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q",
    "Stable Diffusion (UNet)": "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    "Stable Diffusion 3": "lora_unet_joint_blocks_0_x_block_attn_qkv",
    "HunyuanVideo": "lora_unet_double_blocks_0_img_mlp_fc1",
    "Qwen-Image": "transformer.transformer_blocks.0.img_mlp.net.0.proj",
    "FLUX.2": "diffusion_model.double_stream_modulation_img.lin",
    "Wan": "lora_unet_blocks_0_self_attn_q",
    "Z-Image or Lumina": "diffusion_model.layers.0.attention.to_q",
    "LTX-Video, PixArt or CogVideoX": "transformer.transformer_blocks.0.attn1.to_q",
    "HiDream": "diffusion_model.double_stream_blocks.0.block.attn1.to_q",
}


@pytest.mark.parametrize("architecture", FOREIGN)
def test_a_lora_for_another_architecture_is_named_as_such(tmp_path: Path, architecture: str):
    path = save(tmp_path / "a.safetensors", tiny_lora(FOREIGN[architecture]))
    with pytest.raises(UserError) as caught:
        read(path)
    assert f"is an adapter for {architecture}, not for FLUX.1 Kontext" in str(caught.value)


def test_hunyuan_video_is_found_out_though_its_attention_has_our_names(tmp_path: Path):
    path = save(tmp_path / "a.safetensors", tiny_lora("lora_unet_double_blocks_19_img_attn_proj"))
    with pytest.raises(UserError, match="another model, with more blocks: block 19 in .* has 2"):
        read(path)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv.oft_blocks", "OFT"),
        ("base_model.model.double_blocks.0.img_attn.qkv.oft_R.weight", "OFT"),
        ("lycoris_transformer_blocks_0_attn_to_q.a1.weight", "GLoRA"),
        ("lycoris_transformer_blocks_0_attn_to_q.on_input", "IA3"),
    ],
)
def test_what_is_no_sum_is_refused(tmp_path: Path, key: str, kind: str):
    path = save(
        tmp_path / "a.safetensors", {key: torch.zeros(2, 4, 4), "lora_unet_x.alpha": torch.tensor(1.0)}
    )
    with pytest.raises(UserError, match=f"is an? {kind} adapter"):
        read(path)


@pytest.mark.parametrize("stem", ["img_in", "transformer.x_embedder"])
def test_control_loras_are_refused(tmp_path: Path, stem: str):
    path = save(tmp_path / "a.safetensors", tiny_lora(stem, columns=128))
    with pytest.raises(UserError, match="control LoRA .* 128 channels. Kontext has 64"):
        read(path)
