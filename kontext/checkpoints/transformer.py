"""The FLUX transformer from its file: BFL or diffusers layout, sizes read from the tensors' shapes."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from kontext.checkpoints.names import SWAPPED, diffusers_modules
from kontext.checkpoints.reading import Edit, Origin, check, count, fill, stacked_shape
from kontext.checkpoints.source import Source, open_source
from kontext.errors import UserError
from kontext.model.transformer import Transformer, TransformerConfig
from kontext.quant import Mode, keep_in

THETA = 10_000.0
BLOCKS = ("double_blocks.", "single_blocks.")


def load_transformer(
    path: Path | str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    kept: torch.dtype | None = None,
    quantization: Mode | None = None,
    edit: Edit | None = None,
    on_host: Callable[[TransformerConfig], Callable[[str], bool]] | None = None,
) -> Transformer:
    """Load a transformer, frozen and in evaluation mode.

    kept: of the weights of the blocks' linears, if not `dtype`, which they are computed with in.
    quantization: keeps the linears of the blocks, but for modulation, in few bits; see `quant.values`. What the
    file has in fp8 stays as it is there, but for "nf4" and "int8_fast".
    edit: called with each tensor's BFL name (`double_blocks.0.img_attn.qkv.weight`) and its value, on
    `device`, in the file's dtype (float32 where that is fp8), before the value is cast or quantised. It
    returns the very same tensor, or a new one of any float dtype; it never changes the one it is given.
    on_host: of a model of these sizes, the names of tensors that stay in host memory (`memory.placement`).

    Raises UserError when the file is not a complete FLUX transformer.
    """
    source = open_source(path, "transformer")
    model, origins = _empty(source)
    linears = {name for name, module in model.named_modules() if is_quantisable(name, module)}
    narrow = keep_in(model, block_linears(model), kept) if kept not in (None, dtype) else set()
    fill(
        model,
        source,
        origins,
        device=device,
        dtype=lambda name: kept if name in narrow else dtype,
        select=linears.__contains__,
        mode=quantization,
        edit=edit,
        on_host=on_host(model.config) if on_host else None,
    )
    return model


def empty_transformer(path: Path | str) -> Transformer:
    """The transformer of a file on the meta device: complete, but for its numbers. Raises UserError as loading does."""
    return _empty(open_source(path, "transformer"))[0]


def _empty(source: Source) -> tuple[Transformer, dict[str, Origin]]:
    """The model, and where its tensors are in the file, which has all of them."""
    with torch.device("meta"):
        model = Transformer(transformer_config(source))
    origins = {name: _origin(source, name) for name in model.state_dict()}
    check(source, model, origins)
    return model, origins


def block_linears(model: Transformer) -> list[str]:
    """All linears of the blocks, among them those that make the modulation: more than a quarter of FLUX's weights."""
    found = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return [name for name in found if name.startswith(BLOCKS)]


def is_quantisable(name: str, module: nn.Module) -> bool:
    """The linears of the blocks that work on tokens, not those that make the modulation."""
    inside = name.startswith(BLOCKS)
    return inside and isinstance(module, nn.Linear) and not name.endswith((".modulation.lin", "_mod.lin"))


def transformer_config(source: Source) -> TransformerConfig:
    """Sizes from shapes. Raises UserError when a tensor is missing, or the model is not for editing."""

    def shape(name: str) -> tuple[int, ...]:
        return stacked_shape(source, _origin(source, name))

    width, in_channels = shape("img_in.weight")
    out_channels = shape("final_layer.linear.weight")[0]
    head = shape("double_blocks.0.img_attn.norm.query_norm.scale")[0]
    if in_channels != out_channels:
        raise UserError(
            f"{source.path} takes {in_channels} channels and gives {out_channels}: it is FLUX.1 Fill, Canny, "
            "Depth or alike. --dit expects FLUX.1 Kontext."
        )
    blocks, singles = _block_names(source)
    return TransformerConfig(
        in_channels=in_channels,
        out_channels=out_channels,
        context_width=shape("txt_in.weight")[1],
        vector_width=shape("vector_in.in_layer.weight")[1],
        width=width,
        heads=width // head,
        mlp_width=shape("double_blocks.0.img_mlp.0.weight")[0],
        double_blocks=count(source.keys(), blocks),
        single_blocks=count(source.keys(), singles),
        axes=tuple(source.config.get("axes_dims_rope") or rope_axes(head)),
        theta=THETA,
        guidance=_origin(source, "guidance_in.in_layer.weight").keys[0] in source,
    )


def rope_axes(head: int) -> tuple[int, int, int]:
    """Channels of a head for each position axis: 1/8, 7/16, 7/16, all even; FLUX's 128 are 16, 56, 56."""
    pairs = head // 2
    first = max(1, round(pairs / 8))
    first += (pairs - first) % 2
    return 2 * first, pairs - first, pairs - first


def is_diffusers(source: Source) -> bool:
    return "x_embedder.weight" in source


def _block_names(source: Source) -> tuple[str, str]:
    if is_diffusers(source):
        return "transformer_blocks", "single_transformer_blocks"
    return "double_blocks", "single_blocks"


def _origin(source: Source, name: str) -> Origin:
    """The tensors of the file that make up a BFL tensor."""
    if not is_diffusers(source):
        return Origin((name,))
    module, _, parameter = name.rpartition(".")
    parameter = "weight" if parameter == "scale" else parameter
    return Origin(tuple(f"{m}.{parameter}" for m in diffusers_modules(module)), swapped=module == SWAPPED)
