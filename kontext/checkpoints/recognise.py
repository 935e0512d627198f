"""What a file of weights is, told from its tensors' names."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["transformer", "autoencoder", "T5", "CLIP", "LoRA"]


@dataclass(frozen=True)
class Expected:
    """What a command line option wants."""

    text: str
    flag: str
    subfolders: tuple[str, ...]  # in a diffusers pipeline folder
    prefixes: tuple[str, ...]  # before all names, in files that hold more than one model


EXPECTED: dict[str, Expected] = {
    "transformer": Expected(
        "a FLUX transformer", "--dit", ("transformer",), ("model.diffusion_model.", "diffusion_model.")
    ),
    "autoencoder": Expected("a FLUX autoencoder", "--vae", ("vae",), ("vae.", "first_stage_model.")),
    "T5": Expected(
        "a T5 v1.1 encoder", "--text-encoder1", ("text_encoder_2",), ("text_encoders.t5xxl.transformer.",)
    ),
    "CLIP": Expected(
        "a CLIP text model", "--text-encoder2", ("text_encoder",), ("text_encoders.clip_l.transformer.",)
    ),
    "LoRA": Expected("a LoRA", "--lora-weight", (), ()),
}


@dataclass(frozen=True)
class Recognised:
    """`kind` and `layout` are set for what this program reads; `text` names everything, for messages."""

    text: str
    kind: Kind | None = None
    layout: Literal["bfl", "diffusers"] | None = None


@dataclass(frozen=True)
class _Sign:
    """A regex that some key must match from its start, and what the file then is."""

    pattern: str
    meaning: Recognised


def _sign(pattern: str, text: str, kind: Kind | None = None, layout: str | None = None) -> _Sign:
    return _Sign(pattern, Recognised(text, kind, layout))


# The first that matches counts: particular before general.
_LORA = (
    r"((lora_(unet|te\d?|transformer)|lycoris)_.*"
    r"|.*[._]lora[._](up|down|A|B|mid|linear_layer)\b.*"
    r"|.*_lora[12]?\.(up|down)\..*"
    r"|.*\.(hada_w1_a|lokr_w[12]|lokr_w[12]_a|oft_blocks|oft_R|diff|diff_b|set_weight|w_norm|b_norm|dora_scale)(\.weight)?$)"
)
_SD_LORA = r"(lora_unet_|unet\.)(.*)(input_blocks|output_blocks|middle_block|down_blocks|up_blocks|mid_block)"
_SIGNS = (
    _sign(_SD_LORA, "a LoRA for Stable Diffusion", "LoRA"),
    _sign(_LORA, "a LoRA", "LoRA"),
    _sign(r".*\.(qweight|wscales|smooth_factor)$", "a 4-bit transformer for nunchaku"),
    _sign(r".*\.weight\.(absmax|quant_state\..*)$", "a checkpoint quantised with bitsandbytes"),
    _sign(r"double_stream_modulation_(img|txt)\.", "a FLUX.2 transformer"),
    _sign(r"distilled_guidance_layer\.", "a Chroma transformer"),
    _sign(r"double_blocks\.0\.img_attn\.qkv\.weight$", "a FLUX transformer (BFL layout)",
          "transformer", "bfl"),
    _sign(r"single_transformer_blocks\.0\.proj_mlp\.weight$", "a FLUX transformer (diffusers layout)",
          "transformer", "diffusers"),
    _sign(r"joint_blocks\.", "a Stable Diffusion 3 transformer"),
    _sign(r"conditioner\.embedders\.", "a Stable Diffusion XL checkpoint"),
    _sign(r"input_blocks\.0\.", "a Stable Diffusion UNet"),
    _sign(r"down_blocks\.0\.(resnets|attentions)\.", "a Stable Diffusion UNet (diffusers layout)"),
    _sign(r"quant_conv\.", "an autoencoder of Stable Diffusion"),
    _sign(r"decoder\.up\.0\.block\.0\.conv1\.weight$", "an autoencoder (BFL layout)", "autoencoder", "bfl"),
    _sign(r"decoder\.up_blocks\.0\.resnets\.0\.conv1\.weight$", "an autoencoder (diffusers layout)",
          "autoencoder", "diffusers"),
    _sign(r"encoder\.block\.1\.layer\.0\.SelfAttention\.relative_attention_bias\.", "a UMT5 encoder"),
    _sign(r"encoder\.block\.0\.layer\.1\.DenseReluDense\.wi\.", "a T5 encoder of the first version"),
    _sign(r"encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight$", "a T5 encoder", "T5"),
    _sign(r"(text_model\.)?encoder\.layers\.0\.self_attn\.q_proj\.weight$", "a CLIP text model", "CLIP"),
    _sign(r"vision_model\.", "a CLIP image model"),
    _sign(r"(model\.)?transformer\.resblocks\.", "an OpenCLIP text model"),
)  # fmt: skip
_COMPILED = tuple((re.compile(sign.pattern), sign.meaning) for sign in _SIGNS)
_PREFIXES = ("", *(prefix for expected in EXPECTED.values() for prefix in expected.prefixes))


def without_prefix(keys: Iterable[str], prefix: str) -> list[str]:
    """The keys below a prefix, with it removed."""
    return [key[len(prefix) :] for key in keys if key.startswith(prefix)]


def recognise(keys: Collection[str]) -> Recognised:
    """What these names belong to, without a prefix."""
    for pattern, meaning in _COMPILED:
        if any(pattern.match(key) for key in keys):
            return meaning
    some = ", ".join(sorted(keys)[:3])
    return Recognised(f"nothing that kontext knows (tensors such as {some})" if keys else "an empty file")


def find_prefix(keys: Collection[str], kind: Kind) -> str | None:
    """The prefix below which a model of this kind lies ("" for none); None when there is no such model."""
    for prefix in (*EXPECTED[kind].prefixes, ""):
        if recognise(without_prefix(keys, prefix)).kind == kind:
            return prefix
    return None


def describe(keys: Collection[str]) -> str:
    """What the file is, under whatever prefix."""
    found = [recognise(below) for prefix in _PREFIXES if (below := without_prefix(keys, prefix))]
    known = [f.text for f in found if not f.text.startswith("nothing")]
    return known[0] if known else found[0].text if found else "an empty file"
