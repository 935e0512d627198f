"""From a file to a model: a model is built on the meta device, and its tensors are read one by one.

Files in fp8 are read too: a plain cast, or as ComfyUI writes them, with a factor beside each weight
(`layer.scale_weight` or `layer.weight_scale`; what stands for the layer's input is not needed here).
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kontext.checkpoints.source import Source
from kontext.console import notice
from kontext.errors import UserError
from kontext.quant import FP8, Mode, Quantised, dequantise, quantisable, quantise, quantised_linear
from kontext.readahead import read_ahead

SCALES = ("scale_weight", "weight_scale")
COMPANION = re.compile(r"(.*\.)?(scale_weight|weight_scale|scale_input|input_scale|comfy_quant|scaled_fp8)")
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_LISTED = 40  # names in one message

Edit = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Origin:
    """Where a model's tensor comes from: tensors of the file, stacked along the first axis.

    swapped: the two halves of the file's tensor change places.
    """

    keys: tuple[str, ...]
    swapped: bool = False


def stacked_shape(source: Source, origin: Origin) -> tuple[int, ...]:
    """Shape of the whole. Raises UserError when a part is missing."""
    for key in origin.keys:
        if key not in source:
            raise UserError(f"{source.path} is not complete: the tensor {key} is missing.")
    first, *rest = (source.shape(key) for key in origin.keys)
    return (first[0] + sum(shape[0] for shape in rest), *first[1:])


def count(keys: Iterable[str], prefix: str) -> int:
    """Length of a list of modules, from the highest number that follows the prefix."""
    found = (re.match(re.escape(prefix) + r"\.(\d+)\.", key) for key in keys)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def check(source: Source, model: nn.Module, origins: Mapping[str, Origin], ignored: str = "(?!)") -> None:
    """See that file and model have the same tensors; `ignored` is a regex of keys that do not matter.

    Raises UserError with every missing, unknown and misshapen tensor.
    """
    wanted = [key for origin in origins.values() for key in origin.keys]
    missing = [key for key in dict.fromkeys(wanted) if key not in source]
    known = set(wanted)
    keys = source.keys()
    unknown = [
        key
        for key in keys
        if key not in known and not COMPANION.fullmatch(key) and not re.match(ignored, key)
    ]
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    misshapen = [
        f"{', '.join(origin.keys)} {stacked_shape(source, origin)} instead of {shapes[name]}"
        for name, origin in origins.items()
        if not set(origin.keys) & set(missing) and not _fits(stacked_shape(source, origin), shapes[name])
    ]
    faults = (("missing", missing), ("unknown", unknown), ("of another shape", misshapen))
    listed = "; ".join(f"{len(names)} {what}: {_list(names)}" for what, names in faults if names)
    if listed:
        raise UserError(f"{source.path} does not fit its model. Tensors {listed}.")


def _fits(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Equal, or a 1x1 convolution kept as a matrix."""
    return found == wanted or (*found, 1, 1) == wanted


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def tell_of_fp8(source: Source, dtype: torch.dtype, option: str) -> None:
    """A notice of weights that are in fp8 in the file and will be in `dtype` in memory, for `option` is not given."""
    entries = map(source.entry, source.keys())
    if found := sum(entry.dtype == FP8 and len(entry.shape) == 2 for entry in entries):
        notice(
            f"{source.path}: {found} weights are in 8 bits there, and take {dtype.itemsize} times the memory here. {option} "
            "keeps them as they are."
        )


def fill(
    model: nn.Module,
    source: Source,
    origins: Mapping[str, Origin],
    *,
    device: torch.device | str,
    dtype: Callable[[str], torch.dtype],
    select: Callable[[str], bool] | None = None,
    mode: Mode | None = None,
    edit: Edit | None = None,
    on_host: Callable[[str], bool] | None = None,
) -> None:
    """Read every tensor of a meta model, in the order of the file, to its device and dtype.

    dtype: by tensor name. select: names of the linears that `mode` turns into a `QuantisedLinear`. edit: see
    `load_transformer`. on_host: names of tensors that end on the CPU, whatever the device is. Only one tensor at a
    time exists in another form than its last one. Names with the same origin share their tensor.
    """
    read_ahead(source.files)
    model.requires_grad_(False)
    state: dict[str, Tensor] = {}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    order = {key: i for i, key in enumerate(source.keys())}
    first: dict[Origin, str] = {}
    for name in sorted(origins, key=lambda n: order[origins[n].keys[0]]):
        origin = origins[name]
        if origin in first:
            state[name] = state[first[origin]]
            continue
        first[origin] = name
        layer, _, parameter = name.rpartition(".")
        chosen = mode and select and parameter == "weight" and select(layer)
        if chosen and quantisable(shapes[name], mode):
            weight = _quantised(source, origin, name, device, mode, edit)
            made = _put_quantised(model, layer, weight, mode)
        else:
            value = _edited(_whole(source, origin, device), name, edit)
            made = {name: value.to(dtype(name)).view(shapes[name])}
        stays = on_host is not None and on_host(name)
        state |= {key: tensor.cpu() if stays else tensor for key, tensor in made.items()}
    model.load_state_dict(state, strict=True, assign=True)
    model.eval()


def _put_quantised(model: nn.Module, layer: str, weight: Quantised, mode: Mode) -> dict[str, Tensor]:
    """Put an empty QuantisedLinear in the place of a linear, and return the tensors to fill it with."""
    tensors = {f"{layer}.weight": weight.weight}
    if weight.scale is not None:
        tensors[f"{layer}.scale"] = weight.scale
    meta = [t if t is None else t.to("meta") for t in (weight.weight, weight.scale)]
    model.set_submodule(layer, quantised_linear(Quantised(*meta), model.get_submodule(layer).bias, mode))
    return tensors


def _quantised(
    source: Source, origin: Origin, name: str, device: torch.device | str, mode: Mode, edit: Edit | None
) -> Quantised:
    """The weight in few bits: as the file has it where it is in fp8 already, and not edited.

    Four bits, and products of whole numbers, ask for another form than that.
    """
    in_fp8 = all(source.dtype(key) == FP8 for key in origin.keys) and not origin.swapped
    kept = in_fp8 and mode not in ("nf4", "int8_fast")
    if not kept:
        return quantise(_edited(_whole(source, origin, device), name, edit), mode)
    weight = _stack([_part(source, key, device) for key in origin.keys])
    if edit is None:
        return weight
    plain = dequantise(weight.weight, weight.scale, torch.float32)
    edited = edit(name, plain)
    return weight if edited is plain else quantise(edited, mode)


def _edited(value: Tensor, name: str, edit: Edit | None) -> Tensor:
    return value if edit is None else edit(name, value)


def _whole(source: Source, origin: Origin, device: torch.device | str) -> Tensor:
    """The stacked tensor: in the file's dtype, or in float32 where that is fp8."""
    parts = [_plain(_part(source, key, device)) for key in origin.keys]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return torch.cat(whole.chunk(2)[::-1]) if origin.swapped else whole


def _plain(part: Quantised) -> Tensor:
    if part.weight.dtype not in FP8_DTYPES:
        return part.weight
    return dequantise(part.weight, part.scale, torch.float32)


def _part(source: Source, key: str, device: torch.device | str) -> Quantised:
    """A tensor of the file with its scale, if it has one."""
    weight, scale = source.get(key, device), None
    layer, _, parameter = key.rpartition(".")
    names = [f"{layer}.{suffix}" for suffix in SCALES if f"{layer}.{suffix}" in source]
    if parameter == "weight" and names:
        scale = _scale_grid(source, names[0], weight, device)
    if not weight.is_floating_point() or (scale is not None and weight.dtype not in FP8_DTYPES):
        raise UserError(
            f"{source.path} is quantised in a way that kontext does not read: {key} is {weight.dtype}. "
            "Use the file in bfloat16 or in fp8."
        )
    return Quantised(weight, scale)


def _scale_grid(source: Source, name: str, weight: Tensor, device: torch.device | str) -> Tensor:
    """Scales as (out, blocks), from one number, one per row, or one per row and block of columns."""
    scale = source.get(name, device).float()
    rows, columns = weight.shape
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(rows, 1).contiguous()
    grid = scale.view(rows, -1) if scale.shape[0] == rows else None
    if grid is None or columns % grid.shape[1]:
        raise UserError(
            f"{source.path}: {name} has {tuple(scale.shape)} scales, which do not fit its weight."
        )
    return grid


def _stack(parts: list[Quantised]) -> Quantised:
    """Parts of one fused weight; a part without scales stands for itself."""
    if len(parts) == 1:
        return parts[0]
    weight = torch.cat([part.weight.view(torch.uint8) for part in parts]).view(FP8)
    if all(part.scale is None for part in parts):
        return Quantised(weight, None)
    blocks = max(part.scale.shape[1] for part in parts if part.scale is not None)
    scales = [
        torch.ones(len(part.weight), blocks, device=weight.device)
        if part.scale is None
        else part.scale.repeat_interleave(blocks // part.scale.shape[1], 1)
        for part in parts
    ]
    return Quantised(weight, torch.cat(scales))
