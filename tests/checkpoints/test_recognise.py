"""Telling files apart by the names in them. Names are those of published files."""

import pytest

from kontext.checkpoints.recognise import describe, find_prefix, recognise

NAMES = {
    "a FLUX transformer (BFL layout)": ["double_blocks.0.img_attn.qkv.weight", "img_in.weight"],
    "a FLUX transformer (diffusers layout)": [
        "single_transformer_blocks.0.proj_mlp.weight",
        "transformer_blocks.0.attn.add_q_proj.weight",
    ],
    "a FLUX.2 transformer": [
        "double_blocks.0.img_attn.qkv.weight",
        "double_stream_modulation_img.lin.weight",
    ],
    "a Chroma transformer": [
        "double_blocks.0.img_attn.qkv.weight",
        "distilled_guidance_layer.in_proj.weight",
    ],
    "a Stable Diffusion 3 transformer": [
        "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight"
    ],
    "a Stable Diffusion XL checkpoint": [
        "conditioner.embedders.1.model.ln_final.weight",
        "first_stage_model.quant_conv.weight",
        "model.diffusion_model.input_blocks.0.0.weight",
    ],
    "a Stable Diffusion UNet": [
        "model.diffusion_model.input_blocks.0.0.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    ],
    "a Stable Diffusion UNet (diffusers layout)": ["down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"],
    "an autoencoder of Stable Diffusion": ["decoder.up.0.block.0.conv1.weight", "quant_conv.weight"],
    "an autoencoder (BFL layout)": ["decoder.up.0.block.0.conv1.weight", "encoder.conv_in.weight"],
    "an autoencoder (diffusers layout)": ["decoder.up_blocks.0.resnets.0.conv1.weight"],
    "a T5 encoder": ["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"],
    "a UMT5 encoder": [
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",
    ],
    "a T5 encoder of the first version": [
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        "encoder.block.0.layer.1.DenseReluDense.wi.weight",
    ],
    "a CLIP text model": ["text_model.encoder.layers.0.self_attn.q_proj.weight"],
    "an OpenCLIP text model": ["transformer.resblocks.0.attn.in_proj_weight"],
    "a 4-bit transformer for nunchaku": ["transformer_blocks.0.mlp_fc1.qweight"],
    "a checkpoint quantised with bitsandbytes": [
        "double_blocks.0.img_attn.qkv.weight",
        "double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4",
    ],
}
LORAS = [
    "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
    "lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight",
    "lycoris_transformer_blocks_0_attn_to_q.lokr_w1",
    "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
    "base_model.model.double_blocks.0.img_attn.qkv.lora_A.default.weight",
    "diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight",
    "double_blocks.0.processor.qkv_lora1.down.weight",
    "transformer.transformer_blocks.0.attn.to_q.lora.down.weight",
    "transformer.transformer_blocks.0.attn.to_q_lora.down.weight",
    "transformer_blocks.0.attn.processor.to_q_lora.lora_linear_layer.down.weight",
    "diffusion_model.single_blocks.0.linear1.hada_w1_a",
    "diffusion_model.single_blocks.0.linear1.lokr_w1_a",
    "diffusion_model.img_in.diff_b",
    "diffusion_model.img_in.set_weight",
    "double_blocks.0.img_attn.norm.query_norm.w_norm",
    "double_blocks.0.img_attn.norm.query_norm.b_norm",
]
STABLE_DIFFUSION_LORAS = [
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight",
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k.lora_down.weight",
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight",
]


@pytest.mark.parametrize("text", NAMES)
def test_models(text):
    assert describe(NAMES[text]) == text


@pytest.mark.parametrize("key", LORAS)
def test_adapters(key):
    assert recognise([key]).kind == "LoRA" and recognise([key]).text == "a LoRA"


@pytest.mark.parametrize("key", STABLE_DIFFUSION_LORAS)
def test_adapters_of_other_models(key):
    assert describe([key]) == "a LoRA for Stable Diffusion"


def test_unknown_files_show_what_is_in_them():
    assert describe(["b.x", "a.y"]) == "nothing that kontext knows (tensors such as a.y, b.x)"
    assert describe([]) == "an empty file"


def test_prefixes():
    bfl = NAMES["a FLUX transformer (BFL layout)"]
    assert find_prefix(bfl, "transformer") == ""
    assert (
        find_prefix([f"model.diffusion_model.{key}" for key in bfl], "transformer")
        == "model.diffusion_model."
    )
    assert find_prefix(bfl, "autoencoder") is None


def test_models_of_the_same_shape_family_are_not_taken_for_flux():
    for text in ("a FLUX.2 transformer", "a Chroma transformer", "a checkpoint quantised with bitsandbytes"):
        assert find_prefix(NAMES[text], "transformer") is None
    assert find_prefix(NAMES["an autoencoder of Stable Diffusion"], "autoencoder") is None
