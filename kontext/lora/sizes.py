"""What the shapes in adapter files tell: the transformer that they are for, and the ranks of their modules."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from kontext.checkpoints.source import open_source
from kontext.errors import UserError
from kontext.lora.adapter import Size
from kontext.lora.deltas import Decomposed, Delta, Hadamard, Kronecker
from kontext.lora.files import AdapterFile
from kontext.lora.fuse import fuse
from kontext.lora.keys import block_of, split_key
from kontext.lora.products import factorise
from kontext.model.transformer import FLUX, TransformerConfig

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
    width = min(widths, default=FLUX.width)
    if width == FLUX.width:
        published = {"double": FLUX.double_blocks, "single": FLUX.single_blocks}
        blocks = {kind: max(count, published[kind]) for kind, count in blocks.items()}
    return replace(
        FLUX,
        width=width,
        heads=max(1, width // 128),
        mlp_width=4 * width,
        double_blocks=blocks["double"],
        single_blocks=blocks["single"],
    )


def sizes_in(adapter: AdapterFile, model: nn.Module, names: Sequence[str]) -> dict[str, Size]:
    """Rank and alpha (of a LoKr its factor too) in `adapter` of those of the modules `names` of `model` that it changes.

    Raises UserError when it changes none of them, and for a change without a rank of its own, such as a full difference.
    """
    sizes = {}
    for name in names:
        deltas = adapter.deltas.get(f"{name}.weight", ())
        if not deltas:
            continue
        size = _size(deltas, model.get_submodule(name).out_features)
        if size is None:
            raise UserError(
                f"{adapter.path}: {name} is no LoRA, DoRA, LoHa or LoKr (split as factor splits), whose ranks "
                "--dim-from-weights can take. Give --network-dim and, for LoKr, factor."
            )
        sizes[name] = size
    if not sizes:
        raise UserError(
            f"{adapter.path} changes none of the modules that are trained: --dim-from-weights has no ranks."
        )
    return sizes


def _size(deltas: Sequence[Delta], rows: int) -> Size | None:
    changes = [d.change.inner if isinstance(d.change, Decomposed) else d.change for d in deltas]
    if len(changes) == 1 and isinstance(changes[0], Hadamard):
        rank = changes[0].w1_a.shape[1]
        return Size(rank, changes[0].scale * rank)
    if len(changes) == 1 and isinstance(changes[0], Kronecker):
        return _kronecker_size(changes[0])
    fused = fuse([Delta(d.target, c, d.key) for d, c in zip(deltas, changes, strict=True)], rows)
    return Size(fused.rank, fused.scale * fused.rank) if fused else None


def _kronecker_size(change: Kronecker) -> Size | None:
    """The factor that splits both sides as in the file; of a w2 that was no product, a rank at which it is none here."""
    (rows, columns), large = change.w1.shape, change.w2.shape
    wanted = (rows, large[0]), (columns, large[1])
    for factor in (-1, *range(1, max(rows, columns) + 1)):
        if wanted == (factorise(rows * large[0], factor), factorise(columns * large[1], factor)):
            rank = change.rank or -(-max(large) // 2)
            return Size(rank, change.scale * rank, factor)
    return None


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
