"""The transformer that adapters are for, told from their own shapes: for work without a checkpoint."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from kontext.checkpoints.source import open_source
from kontext.lora.keys import block_of, split_key
from kontext.model.transformer import TransformerConfig

_PUBLISHED = {"width": 3072, "double": 19, "single": 38}

Shape = tuple[int, ...]


def config_for(paths: Sequence[Path]) -> TransformerConfig:
    """A configuration whose blocks these files fit; FLUX.1's own where they tell nothing.

    Every linear of a block has the model's width as the smaller of its two sides, and the MLP is four times
    as wide.
    """
    widths, blocks = [], {"double": 1, "single": 1}
    for path in paths:
        source = open_source(path, "LoRA")
        stems: dict[str, dict[str, Shape]] = defaultdict(dict)
        for key in source.keys():  # noqa: SIM118
            stem, part = split_key(key) or ("", "")
            stems[stem][part] = source.shape(key)
        for stem, parts in stems.items():
            block, shape = block_of(stem), _shape(parts)
            if block and shape:
                widths.append(min(shape))
                blocks[block[0]] = max(blocks[block[0]], block[1] + 1)
    width = min(widths, default=_PUBLISHED["width"])
    if width == _PUBLISHED["width"]:
        blocks = {kind: max(count, _PUBLISHED[kind]) for kind, count in blocks.items()}
    return TransformerConfig(
        in_channels=64,
        out_channels=64,
        context_width=4096,
        vector_width=768,
        width=width,
        heads=max(1, width // 128),
        mlp_width=4 * width,
        double_blocks=blocks["double"],
        single_blocks=blocks["single"],
        axes=(16, 56, 56),
        theta=10_000.0,
        guidance=True,
    )


def _shape(parts: Mapping[str, Shape]) -> Shape | None:
    """(out, in) of the change that parts of these shapes describe."""
    if {"down", "up"} <= parts.keys():
        return parts["up"][0], parts["down"][-1]
    if {"hada_w1_a", "hada_w1_b"} <= parts.keys():
        return parts["hada_w1_a"][0], parts["hada_w1_b"][-1]
    factors = [_factor(parts, name) for name in ("lokr_w1", "lokr_w2")]
    if all(factors):
        return math.prod(f[0] for f in factors), math.prod(f[1] for f in factors)
    full = parts.get("diff") or parts.get("set_weight") or ()
    return full if len(full) == 2 else None


def _factor(parts: Mapping[str, Shape], name: str) -> Shape:
    if name in parts:
        return parts[name]
    a, b = parts.get(f"{name}_a"), parts.get(f"{name}_b")
    return (a[0], b[-1]) if a and b else ()
