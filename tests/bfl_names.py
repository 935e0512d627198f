"""diffusers' tensor names turned into Black Forest Labs', written out by hand.

An independent check of `kontext.checkpoints.names`: keep it so, and import nothing from kontext here.
"""

import torch
from torch import Tensor


def bfl_transformer(d: dict[str, Tensor], double: int, single: int) -> dict[str, Tensor]:
    """diffusers' FluxTransformer2DModel tensors under BFL's names."""
    out: dict[str, Tensor] = {}

    def put(name: str, *parts: str) -> None:
        for kind in ("weight", "bias"):
            if f"{parts[0]}.{kind}" in d:
                out[f"{name}.{kind}"] = torch.cat([d[f"{p}.{kind}"] for p in parts])

    put("img_in", "x_embedder")
    put("txt_in", "context_embedder")
    for name, source in (("time", "timestep"), ("guidance", "guidance"), ("vector", "text")):
        if f"time_text_embed.{source}_embedder.linear_1.weight" in d:
            put(f"{name}_in.in_layer", f"time_text_embed.{source}_embedder.linear_1")
            put(f"{name}_in.out_layer", f"time_text_embed.{source}_embedder.linear_2")

    for i in range(double):
        b, t = f"double_blocks.{i}", f"transformer_blocks.{i}"
        put(f"{b}.img_mod.lin", f"{t}.norm1.linear")
        put(f"{b}.txt_mod.lin", f"{t}.norm1_context.linear")
        put(f"{b}.img_attn.qkv", f"{t}.attn.to_q", f"{t}.attn.to_k", f"{t}.attn.to_v")
        put(f"{b}.txt_attn.qkv", f"{t}.attn.add_q_proj", f"{t}.attn.add_k_proj", f"{t}.attn.add_v_proj")
        put(f"{b}.img_attn.proj", f"{t}.attn.to_out.0")
        put(f"{b}.txt_attn.proj", f"{t}.attn.to_add_out")
        for name, source in (("img_mlp", "ff"), ("txt_mlp", "ff_context")):
            put(f"{b}.{name}.0", f"{t}.{source}.net.0.proj")
            put(f"{b}.{name}.2", f"{t}.{source}.net.2")
        out[f"{b}.img_attn.norm.query_norm.scale"] = d[f"{t}.attn.norm_q.weight"].clone()
        out[f"{b}.img_attn.norm.key_norm.scale"] = d[f"{t}.attn.norm_k.weight"].clone()
        out[f"{b}.txt_attn.norm.query_norm.scale"] = d[f"{t}.attn.norm_added_q.weight"].clone()
        out[f"{b}.txt_attn.norm.key_norm.scale"] = d[f"{t}.attn.norm_added_k.weight"].clone()

    for i in range(single):
        b, t = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        put(f"{b}.modulation.lin", f"{t}.norm.linear")
        put(f"{b}.linear1", f"{t}.attn.to_q", f"{t}.attn.to_k", f"{t}.attn.to_v", f"{t}.proj_mlp")
        put(f"{b}.linear2", f"{t}.proj_out")
        out[f"{b}.norm.query_norm.scale"] = d[f"{t}.attn.norm_q.weight"].clone()
        out[f"{b}.norm.key_norm.scale"] = d[f"{t}.attn.norm_k.weight"].clone()

    put("final_layer.linear", "proj_out")
    for kind in ("weight", "bias"):  # diffusers: (scale, shift); BFL: (shift, scale)
        scale, shift = d[f"norm_out.linear.{kind}"].chunk(2)
        out[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
    return out


def bfl_autoencoder(d: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """diffusers' AutoencoderKL tensors under BFL's names; linears of attention become 1x1 convolutions."""
    out: dict[str, Tensor] = {}

    def copy(name: str, source: str) -> None:
        for kind in ("weight", "bias"):
            out[f"{name}.{kind}"] = d[f"{source}.{kind}"].clone()

    def resnet(name: str, source: str) -> None:
        for layer in ("norm1", "conv1", "norm2", "conv2"):
            copy(f"{name}.{layer}", f"{source}.{layer}")
        if f"{source}.conv_shortcut.weight" in d:
            copy(f"{name}.nin_shortcut", f"{source}.conv_shortcut")

    for half in ("encoder", "decoder"):
        copy(f"{half}.conv_in", f"{half}.conv_in")
        copy(f"{half}.norm_out", f"{half}.conv_norm_out")
        copy(f"{half}.conv_out", f"{half}.conv_out")
        resnet(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0")
        resnet(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1")
        attention = f"{half}.mid_block.attentions.0"
        copy(f"{half}.mid.attn_1.norm", f"{attention}.group_norm")
        for name, source in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            copy(f"{half}.mid.attn_1.{name}", f"{attention}.{source}")
            weight = out[f"{half}.mid.attn_1.{name}.weight"]
            out[f"{half}.mid.attn_1.{name}.weight"] = weight[:, :, None, None].clone()

    for level in range(levels):
        up = levels - 1 - level  # diffusers counts from the coarsest level, BFL from the finest
        resnet(f"encoder.down.{level}.block.0", f"encoder.down_blocks.{level}.resnets.0")
        resnet(f"decoder.up.{up}.block.0", f"decoder.up_blocks.{level}.resnets.0")
        resnet(f"decoder.up.{up}.block.1", f"decoder.up_blocks.{level}.resnets.1")
        if level < levels - 1:
            copy(f"encoder.down.{level}.downsample.conv", f"encoder.down_blocks.{level}.downsamplers.0.conv")
            copy(f"decoder.up.{up}.upsample.conv", f"decoder.up_blocks.{level}.upsamplers.0.conv")
    return out
