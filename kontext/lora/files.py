"""LoRA files: reading every published format, writing the kohya/musubi one."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kontext.checkpoints.source import Source, open_source
from kontext.errors import UserError
from kontext.files import save_tensors
from kontext.lora.build import Built, Misfit, Scaling, build, pad_inputs, scaling_from, swap_rows
from kontext.lora.deltas import Change, Decomposed, Delta, Hadamard, Kronecker, LowRank, Swapped, Target
from kontext.lora.keys import (
    Place,
    Places,
    family_of,
    foreign_architecture,
    is_text_encoder,
    is_xlabs,
    refused_kind,
    split_key,
)
from kontext.lora.linear import AdapterLinear
from kontext.model.transformer import TransformerConfig

FOLDER_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
METADATA_KEY = "lora_adapter_metadata"

Stems = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as read: what it changes in a transformer of one configuration.

    deltas: {BFL tensor name: changes}. unmatched: keys that mean nothing for this transformer.
    skipped: keys for the text encoders, which this program leaves as they are.
    """

    path: Path
    family: str
    deltas: Mapping[str, tuple[Delta, ...]]
    unmatched: tuple[str, ...]
    skipped: tuple[str, ...]
    metadata: Mapping[str, str]

    @property
    def modules(self) -> list[str]:
        """BFL names of the modules it changes."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in self.deltas))

    @property
    def kinds(self) -> list[str]:
        """LoRA, LoHa, LoKr, DoRA or full difference: all that occur."""
        return sorted({_kind(d.change) for deltas in self.deltas.values() for d in deltas})


def read_adapter(path: Path | str, config: TransformerConfig) -> AdapterFile:
    """Read an adapter of any family for a transformer of `config`.

    path: a safetensors file, or a folder as diffusers and PEFT save it.

    Raises UserError when nothing in the file fits, when it is for another architecture or of a kind that
    is no sum of weight changes, and when a shape is wrong.
    """
    path = _adapter_path(Path(path))
    source = open_source(path, "LoRA")
    keys = list(source.keys())
    skipped = [key for key in keys if is_text_encoder(key)]
    stems, unknown = _group(key for key in keys if not is_text_encoder(key))
    _refuse(path, keys, source)
    places = Places(config)
    matched = _match(path, stems, places)
    _refuse_control(path, source, stems, matched, config)

    deltas = defaultdict(list)
    unmatched = unknown + [
        key for stem, parts in stems.items() if stem not in matched for key in parts.values()
    ]
    scaling = _scaling(path, source.metadata)
    for stem, place in matched.items():
        built = _build(path, source, stem, stems[stem], scaling)
        unmatched += [key for part, key in stems[stem].items() if part not in built.used]
        for delta in _place(path, built, stem, place, places):
            deltas[delta.target.tensor].append(delta)

    family = family_of(matched or stems)
    if not deltas:
        raise UserError(_nothing(path, family, keys, skipped))
    return AdapterFile(
        path=path,
        family=family,
        deltas={name: tuple(changes) for name, changes in deltas.items()},
        unmatched=tuple(unmatched),
        skipped=tuple(skipped),
        metadata=dict(source.metadata),
    )


def save_lora(
    path: Path | str,
    modules: Mapping[str, AdapterLinear],
    *,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write adapters, by dotted BFL name as `attach` returns them, in the layout of kohya, musubi and LyCORIS.

    Raises UserError when the file cannot be written; an older file of that name is then left as it was.
    """
    save_tensors(path, kohya_tensors(modules, dtype), dict(metadata or {}))


def kohya_tensors(modules: Mapping[str, AdapterLinear], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a kohya/musubi file, copied: training may go on while they are written."""
    tensors = {}
    for name, module in modules.items():
        stem = "lora_unet_" + name.replace(".", "_")
        tensors[f"{stem}.alpha"] = torch.tensor(module.alpha, dtype=dtype)
        for part, parameter in module.learned.items():
            tensors[f"{stem}.{part}"] = _copy(parameter, dtype)
    return tensors


def load_weights(modules: Mapping[str, AdapterLinear], adapter: AdapterFile) -> list[str]:
    """Continue from `adapter`: copy its factors into `modules`; returns the modules it says nothing about.

    A module takes the file's weights at its own alpha, so that the change is the same.

    Raises UserError when a module's file has another kind or rank.
    """
    missing = []
    for name, module in modules.items():
        deltas = adapter.deltas.get(f"{name}.weight", ())
        if not deltas:
            missing.append(name)
            continue
        try:
            module.load(deltas)
        except Misfit as error:
            raise UserError(f"{adapter.path}: {name} {error}.") from error
    return missing


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype, copy=True)


def _adapter_path(path: Path) -> Path:
    """The file itself, or the adapter in a folder."""
    if not path.is_dir():
        return path
    found = [path / name for name in FOLDER_FILES if (path / name).is_file()] or sorted(
        path.glob("*.safetensors")
    )
    if not found:
        raise UserError(f"{path}: no adapter in this folder. Expected {' or '.join(FOLDER_FILES)}.")
    return found[0]


def _group(keys: Iterator[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """{stem: {part: key}}, and the keys of which no part is known."""
    stems: dict[str, dict[str, str]] = defaultdict(dict)
    unknown = []
    for key in keys:
        split = split_key(key)
        if split is None or split[1] in stems[split[0]]:
            unknown.append(key)
        else:
            stems[split[0]][split[1]] = key
    return {stem: parts for stem, parts in stems.items() if parts}, unknown


def _match(path: Path, stems: Stems, places: Places) -> dict[str, Place]:
    """{stem: place}. Some files hold the same adapter twice, under two families' names: the first counts.

    Raises UserError for a block that the model does not have: HunyuanVideo has more blocks of the same names.
    """
    matched: dict[str, Place] = {}
    taken: set[Place] = set()
    for stem in stems:
        place = places.find(stem)
        missing = None if place else places.missing_block(stem)
        if missing:
            raise UserError(f"{path} is for another model, with more blocks: {missing}.")
        if place and place not in taken:
            matched[stem] = place
            taken.add(place)
    return matched


def _build(path: Path, source: Source, stem: str, parts: Mapping[str, str], scaling: Scaling) -> Built:
    try:
        return build({part: source.get(key) for part, key in parts.items()}, stem, scaling)
    except Misfit as error:
        raise UserError(f"{path}: {stem}: {error}.") from error


def _place(path: Path, built: Built, stem: str, place: Place, places: Places) -> Iterator[Delta]:
    """The changes of weight and bias at their rows; shapes are checked against the model's."""
    for kind, change in (("weight", built.weight), ("bias", built.bias)):
        tensor = places.tensor(place, kind)
        if change is None or tensor is None:
            continue
        expected = (place.stop - place.start, *places.shapes[tensor][1:])
        if is_xlabs(stem):
            change = pad_inputs(change, expected[1])
        if tuple(change.shape) != expected:
            raise UserError(
                f"{path}: {stem} changes a weight of shape {_shape(change.shape)}, "
                f"but {tensor} of this model is {_shape(expected)} there. "
                "It was made for a model of another size."
            )
        change = swap_rows(change) if place.swapped else change
        yield Delta(Target(tensor, place.start, place.stop), change, stem)


def _scaling(path: Path, metadata: Mapping[str, str]) -> Scaling:
    """PEFT's alphas: in the file's metadata as diffusers writes them, or in adapter_config.json beside it."""
    if METADATA_KEY in metadata:
        return scaling_from(_json(path, metadata[METADATA_KEY]), prefix="transformer.")
    config = path.with_name("adapter_config.json")
    if path.name == FOLDER_FILES[1] and config.is_file():
        return scaling_from(_json(config, config.read_text(encoding="utf-8")))
    return Scaling()


def _json(path: Path, text: str) -> Mapping[str, object]:
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: its PEFT settings are not JSON: {error}.") from error
    return settings if isinstance(settings, dict) else {}


def _refuse(path: Path, keys: list[str], source: Source) -> None:
    """Raise for files that are recognised and cannot be used."""
    kind = refused_kind(keys)
    if kind:
        raise UserError(
            f"{path} is an {kind} adapter: it is no sum of weight changes. LoRA, LoHa, LoKr, DoRA and full "
            "differences can be used."
        )
    architecture = foreign_architecture(key for key in keys if not is_text_encoder(key))
    if architecture:
        raise UserError(f"{path} is an adapter for {architecture}, not for FLUX.1 Kontext.")


def _refuse_control(
    path: Path, source: Source, stems: Stems, matched: Mapping[str, Place], config: TransformerConfig
) -> None:
    """BFL's control LoRAs (Canny, Depth) double the model's input channels for a control latent."""
    for stem, place in matched.items():
        down = stems[stem].get("down")
        if place.module == "img_in" and down and source.shape(down)[1] == 2 * config.in_channels:
            raise UserError(
                f"{path} is a control LoRA (Canny or Depth): it needs a model whose input has "
                f"{2 * config.in_channels} channels. Kontext has {config.in_channels}, and takes its "
                "reference otherwise."
            )


def _nothing(path: Path, family: str, keys: list[str], skipped: list[str]) -> str:
    if keys and len(skipped) == len(keys):
        return f"{path} changes only the text encoders. Nothing in it is for the transformer."
    format_name = "an unknown format" if family == "unknown" else f"the {family} format"
    example = f" such as {keys[0]}" if keys else ""
    return (
        f"{path}: none of its {len(keys)} keys{example} fits this transformer. It looks like {format_name}."
    )


def _kind(change: Change) -> str:
    if isinstance(change, Swapped):
        return _kind(change.inner)
    names = {LowRank: "LoRA", Hadamard: "LoHa", Kronecker: "LoKr", Decomposed: "DoRA"}
    return names.get(type(change), "full difference")


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
