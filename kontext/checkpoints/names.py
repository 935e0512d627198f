"""Names of the same weights in Black Forest Labs' and in diffusers' layout.

A BFL module is made of one or more diffusers modules, its *parts*, stacked along the output rows: the fused
`qkv` of q, k, v, and a single block's `linear1` of q, k, v, mlp. Everything else is one to one. Loading,
merging and LoRA files all go through this table.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
_OUTER = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
_BLOCKS = {
    "double_blocks": ("transformer_blocks", _DOUBLE),
    "single_blocks": ("single_transformer_blocks", _SINGLE),
}

SWAPPED = "final_layer.adaLN_modulation.1"  # BFL stacks (shift, scale), diffusers (scale, shift)


@dataclass(frozen=True)
class Part:
    """Where a diffusers module lies: part `index` of the `count` parts of the BFL module `name`."""

    name: str
    index: int
    count: int


def _inverse(table: dict[str, tuple[str, ...]]) -> dict[str, Part]:
    return {d: Part(b, i, len(parts)) for b, parts in table.items() for i, d in enumerate(parts)}


_LOCATE_OUTER = _inverse(_OUTER)
_LOCATE_BLOCK = {diffusers: (bfl, _inverse(table)) for bfl, (diffusers, table) in _BLOCKS.items()}
_BLOCK = re.compile(r"(\w+)\.(\d+)\.(.+)")


def locate(module: str) -> Part | None:
    """Place of a diffusers transformer module (`transformer_blocks.0.attn.to_k`); None elsewhere."""
    match = _BLOCK.fullmatch(module)
    if not match or match[1] not in _LOCATE_BLOCK:
        return _LOCATE_OUTER.get(module)
    blocks, table = _LOCATE_BLOCK[match[1]]
    part = table.get(match[3])
    return part and Part(f"{blocks}.{match[2]}.{part.name}", part.index, part.count)


def diffusers_modules(module: str) -> tuple[str, ...]:
    """The diffusers modules that make up a BFL module, in the order of its rows; () for an unknown name."""
    match = _BLOCK.fullmatch(module)
    if not match or match[1] not in _BLOCKS:
        return _OUTER.get(module, ())
    blocks, table = _BLOCKS[match[1]]
    return tuple(f"{blocks}.{match[2]}.{part}" for part in table.get(match[3], ()))


def bfl_modules(double_blocks: int, single_blocks: int, *, norms: bool = False) -> Iterator[str]:
    """Names of all BFL modules with weights, in the order of the model; the QK norms on request."""
    tables = [("", _OUTER)]
    tables += [(f"double_blocks.{i}.", _DOUBLE) for i in range(double_blocks)]
    tables += [(f"single_blocks.{i}.", _SINGLE) for i in range(single_blocks)]
    for prefix, table in tables:
        yield from (prefix + name for name in table if norms or not name.endswith("_norm"))


def part_sizes(module: str, *, width: int, mlp_width: int) -> tuple[int, ...]:
    """Output rows of each part of a fused BFL module; () for a module of one part."""
    if module.endswith(".qkv"):
        return (width,) * 3
    return (width, width, width, mlp_width) if module.endswith(".linear1") else ()


def part_rows(part: Part, *, width: int, mlp_width: int) -> slice:
    """Rows of the BFL weight (and bias) that the part fills; all rows for a module of one part."""
    sizes = part_sizes(part.name, width=width, mlp_width=mlp_width)
    if part.count == 1:
        return slice(None)
    start = sum(sizes[: part.index])
    return slice(start, start + sizes[part.index])


def bfl_tensor(key: str) -> tuple[str, Part] | None:
    """BFL tensor name and part for a diffusers tensor name: `attn.norm_q.weight` -> `query_norm.scale`."""
    module, _, parameter = key.rpartition(".")
    part = locate(module)
    if part is None:
        return None
    return f"{part.name}.{'scale' if part.name.endswith('_norm') else parameter}", part


# ---- autoencoder ----

_AE_LAYERS = {
    "conv_norm_out": "norm_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "conv_shortcut": "nin_shortcut",
}
_AE_LAYER = re.compile(r"(?<!\w)(" + "|".join(map(re.escape, _AE_LAYERS)) + r")(?=\.)")
_AE_LEVEL = re.compile(
    r"(encoder\.down|decoder\.up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)"
)


def autoencoder_tensor(key: str, levels: int) -> str:
    """BFL's name for a diffusers AutoencoderKL tensor; a name known to neither is returned as it is.

    BFL numbers the decoder's levels from full resolution, diffusers from the lowest.
    """
    match = _AE_LEVEL.fullmatch(key)
    if match:
        half, level, kind, index, rest = match.groups()
        place = int(level) if half == "encoder.down" else levels - 1 - int(level)
        block = f"block.{index}" if kind == "resnets" else kind.removesuffix("rs")
        return f"{half}.{place}.{block}.{rest.replace('conv_shortcut.', 'nin_shortcut.')}"
    half, _, rest = key.partition(".")
    return f"{half}.{_AE_LAYER.sub(lambda m: _AE_LAYERS[m[1]], rest)}"
