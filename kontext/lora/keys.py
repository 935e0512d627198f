"""How adapter files name things: the parts of a key, the modules they mean, the families that write them.

A key is a *stem* that names a module and a suffix that names a *part* of the adapter there:
`lora_unet_double_blocks_0_img_attn_qkv` + `.lora_down.weight`. Stems are compared with dots and underscores
made equal and known prefixes removed, so one table of BFL and diffusers names serves every family.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from kontext.checkpoints.names import SWAPPED, diffusers_modules, part_sizes
from kontext.model.transformer import Transformer, TransformerConfig

_PARTS = tuple(
    (re.compile(suffix + "$"), part)
    for suffix, part in (
        (r"\.lora_(?:down|A)(?:\.(?!weight$)\w+)?(?:\.weight)?", "down"),
        (r"\.lora_(?:up|B)(?:\.(?!weight$|bias$)\w+)?(?:\.weight)?", "up"),
        (r"\.lora_(?:up|B)(?:\.\w+)?\.bias", "up_bias"),
        (r"(?:[._]lora|\.lora_linear_layer)\.down\.weight", "down"),
        (r"(?:[._]lora|\.lora_linear_layer)\.up\.weight", "up"),
        (r"\.alpha", "alpha"),
        (r"\.hada_w1_a", "hada_w1_a"),
        (r"\.hada_w1_b", "hada_w1_b"),
        (r"\.hada_w2_a", "hada_w2_a"),
        (r"\.hada_w2_b", "hada_w2_b"),
        (r"\.lokr_w1", "lokr_w1"),
        (r"\.lokr_w1_a", "lokr_w1_a"),
        (r"\.lokr_w1_b", "lokr_w1_b"),
        (r"\.lokr_w2", "lokr_w2"),
        (r"\.lokr_w2_a", "lokr_w2_a"),
        (r"\.lokr_w2_b", "lokr_w2_b"),
        (r"\.dora_scale", "magnitude"),
        (r"\.lora_magnitude_vector(?:\.(?!weight$)\w+)?(?:\.weight)?", "magnitude"),
        (r"\.magnitude", "magnitude"),
        (r"\.(?:diff|w_norm)", "diff"),
        (r"\.(?:diff_b|b_norm)", "diff_b"),
        (r"\.set_weight", "set_weight"),
    )
)
_XLABS = re.compile(r"(?:diffusion_model\.)?(double|single)_blocks\.(\d+)\.processor\.(qkv|proj)_lora([12]?)")
_XLABS_PART = re.compile(_XLABS.pattern + r"\.(down|up)\.weight")

_PREFIXES = (
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
    "base_model_model_",
    "base_model_",
    "model_diffusion_model_",
    "diffusion_model_",
    "transformer_",
    "unet_",
)

_FAMILIES = tuple(
    (re.compile(pattern), family)
    for pattern, family in (
        (_XLABS.pattern, "XLabs"),
        (r"lora_transformer_", "OneTrainer"),
        (
            r"lora_unet_((single_)?transformer_blocks|.*_embedder|norm_out|proj_out)",
            "kohya with diffusers names",
        ),
        (r"lora_unet_", "kohya/musubi"),
        (r"lycoris_", "LyCORIS"),
        (r"base_model\.(model\.)?.*(blocks\.\d+\.(img|txt|linear|mod)|_in\b|final_layer)", "fal"),
        (r"base_model\.", "PEFT"),
        (r".*(double_blocks|single_blocks|\b\w+_in\b|final_layer)", "BFL names"),
        (r".*(transformer_blocks|_embedder|norm_out|proj_out|time_text_embed)", "diffusers/PEFT"),
    )
)

_BLOCK = re.compile(r"(single_)?(?:double_|transformer_|(?<=single_))blocks_(\d+)_")

_TEXT_ENCODER = re.compile(
    r"(base_model\.model\.)?(lora_te\d?_|lycoris_te|lycoris_text|text_encoder|te\d\.|text_model|bundle_emb)"
)

_FOREIGN = tuple(
    (re.compile(pattern), architecture)
    for pattern, architecture in (
        (
            r"(in|out)put_blocks_[4578]_1_transformer_blocks_[1-9]"
            r"|(down|up)_blocks_\d_attentions_\d_transformer_blocks_[1-9]",
            "Stable Diffusion XL",
        ),
        (
            r"(^|_)((in|out)put_blocks|middle_block|down_blocks|up_blocks|mid_block)_",
            "Stable Diffusion (UNet)",
        ),
        (r"joint_(transformer_)?blocks_\d", "Stable Diffusion 3"),
        (
            r"(img|txt)_mlp_fc[12]|individual_token_refiner|single_blocks_\d+_modulation_linear",
            "HunyuanVideo",
        ),
        (r"transformer_blocks_\d+_(img|txt)_(mlp|mod)_", "Qwen-Image"),
        (r"double_stream_modulation|single_stream_modulation|attn_to_qkv_mlp_proj", "FLUX.2"),
        (r"distilled_guidance_layer", "Chroma"),
        (r"(double|single)_stream_blocks_\d", "HiDream"),
        (r"(^|_)layers_\d+_(attention|feed_forward)_", "Z-Image or Lumina"),
        (r"transformer_blocks_\d+_attn[12]_", "LTX-Video, PixArt or CogVideoX"),
        (r"(^|_)blocks_\d+_(self_attn|cross_attn|ffn)_", "Wan"),
    )
)

_REFUSED = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"\.(oft_blocks|oft_diag|oft_R)\b", "OFT"),
        (r"\.boft_", "BOFT"),
        (r"\.(a1|a2|b1|b2)\.weight$", "GLoRA"),
        (r"\.(on_input|ia3_l)\b", "IA3"),
        (r"\.vera_lambda", "VeRA"),
    )
)


@dataclass(frozen=True)
class Place:
    """Rows start to stop of the BFL module `module`; `swapped` if the file has their halves the other way."""

    module: str
    start: int
    stop: int
    swapped: bool = False


def split_key(key: str) -> tuple[str, str] | None:
    """(stem, part) of a key; None when the suffix is of no known kind."""
    xlabs = _XLABS_PART.fullmatch(key)
    if xlabs:
        return key.rsplit(".", 2)[0], xlabs[5]
    for suffix, part in _PARTS:
        match = suffix.search(key)
        if match:
            return key[: match.start()], part
    return None


def normal(name: str) -> str:
    return name.replace(".", "_")


class Places:
    """Finds the place a stem means, for a transformer of one configuration.

    shapes: {BFL tensor name: shape} of that transformer.
    """

    def __init__(self, config: TransformerConfig) -> None:
        with torch.device("meta"):
            self.shapes = {k: tuple(v.shape) for k, v in Transformer(config).state_dict().items()}
        self.width = config.width
        self._blocks = {"single": config.single_blocks, "double": config.double_blocks}
        self._table: dict[str, Place] = {}
        for tensor, shape in self.shapes.items():
            module, _, kind = tensor.rpartition(".")
            if kind != "bias":
                self._enter(module, tensor, shape[0], config)

    def find(self, stem: str) -> Place | None:
        xlabs = _XLABS.fullmatch(stem)
        if xlabs:
            return self._xlabs(*xlabs.groups())
        name = normal(stem)
        while name not in self._table:
            prefix = next((p for p in _PREFIXES if name.startswith(p)), None)
            if prefix is None:
                return None
            name = name.removeprefix(prefix)
        return self._table[name]

    def missing_block(self, stem: str) -> str | None:
        """A note on a block that the stem names and the model lacks: such a file is for another model."""
        kind, number = block_of(stem) or ("single", -1)
        if number < self._blocks[kind]:
            return None
        return f"block {number} in {stem}, where this model has {self._blocks[kind]}"

    def tensor(self, place: Place, kind: str) -> str | None:
        """Name of the place's weight (a norm's is called scale) or bias; None if the model has none."""
        names = [f"{place.module}.{k}" for k in (("weight", "scale") if kind == "weight" else ("bias",))]
        return next((name for name in names if name in self.shapes), None)

    def _enter(self, module: str, tensor: str, rows: int, config: TransformerConfig) -> None:
        whole = Place(module, 0, rows)
        self._table[normal(module)] = self._table[normal(tensor)] = whole
        sizes = part_sizes(module, width=config.width, mlp_width=config.mlp_width) or (rows,)
        start = 0
        for name, size in zip(diffusers_modules(module), sizes, strict=True):
            place = Place(module, start, start + size, swapped=module == SWAPPED)
            self._table[normal(name)] = place
            start += size

    def _xlabs(self, blocks: str, index: str, kind: str, stream: str) -> Place | None:
        """1 is the image's stream, 2 the text's; a single block's qkv leaves the MLP's rows alone."""
        if blocks == "single":
            module = f"single_blocks.{index}.{'linear1' if kind == 'qkv' else 'linear2'}"
        else:
            module = f"double_blocks.{index}.{'txt' if stream == '2' else 'img'}_attn.{kind}"
        whole = self._table.get(normal(module))
        if whole and blocks == "single" and kind == "qkv":
            return Place(module, 0, 3 * self.width)
        return whole


def block_of(stem: str) -> tuple[Literal["single", "double"], int] | None:
    """The kind and the number of the block that a stem names, in either layout."""
    match = _BLOCK.search(normal(stem))
    return ("single" if match[1] else "double", int(match[2])) if match else None


def is_xlabs(stem: str) -> bool:
    return bool(_XLABS.fullmatch(stem))


def is_text_encoder(key: str) -> bool:
    return bool(_TEXT_ENCODER.match(key))


def family_of(stems: Iterable[str]) -> str:
    """The family that wrote most of these stems."""
    counts = Counter(_family(stem) for stem in stems)
    return counts.most_common(1)[0][0] if counts else "unknown"


def _family(stem: str) -> str:
    return next((family for pattern, family in _FAMILIES if pattern.match(stem)), "unknown")


def foreign_architecture(keys: Iterable[str]) -> str | None:
    """The architecture, other than FLUX.1, that these keys are for; None when they do not tell."""
    names = [normal(key) for key in keys]
    return next((title for pattern, title in _FOREIGN if any(pattern.search(n) for n in names)), None)


def refused_kind(keys: Iterable[str]) -> str | None:
    """The kind of adapter, if it is one that no sum of weight changes can express."""
    keys = list(keys)
    return next((kind for pattern, kind in _REFUSED if any(pattern.search(key) for key in keys)), None)
