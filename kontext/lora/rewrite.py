"""A checkpoint with adapters merged into it, from file to file: at most one tensor in memory at a time.

The unit of work is a BFL tensor: the one or more tensors of the base that make it up come in, and the tensors
of the wanted layout and type go out. What nothing changes is copied byte by byte; most of the rest is done in
strips of rows, on all cores.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from kontext.checkpoints.names import diffusers_modules, part_sizes
from kontext.checkpoints.reading import COMPANION, FP8_DTYPES, SCALES
from kontext.checkpoints.source import Entry, Source
from kontext.checkpoints.transformer import is_diffusers, is_quantisable, transformer_config
from kontext.errors import UserError
from kontext.files import atomic_write
from kontext.lora.deltas import swap_halves
from kontext.lora.merge import Plan, merge_weight
from kontext.lora.stream import Spec, Writer
from kontext.lora.strips import (
    VALUES,
    VALUES_ON_GPU,
    Desk,
    by_rows,
    in_float32,
    in_threads,
    merge_strip,
    strips,
)
from kontext.lora.weights import Stored, is_swapped, sibling, stored_tensors
from kontext.model.transformer import Transformer, TransformerConfig
from kontext.quant import FP8

FP8_SCALED = "fp8_scaled"
Layout = Literal["bfl", "diffusers"]
SaveType = torch.dtype | Literal["fp8_scaled"]

FOLDER_FILE = "diffusion_pytorch_model.safetensors"
MARKER = (
    "scaled_fp8"  # ComfyUI: its dtype is that of the weights; two elements ask for multiplication in full
)


@dataclass(frozen=True)
class Job:
    """One BFL tensor: where it lies, and what is written for it in the order of its rows."""

    name: str
    stored: Stored
    outputs: tuple[Spec, ...]
    output_scales: tuple[Spec | None, ...]
    copied: bool


@dataclass
class Loss:
    """Squared norms of the changes merged into fp8 weights, and of what rounding did to them."""

    change: float = 0.0
    error: float = 0.0

    @property
    def relative(self) -> float:
        """Size of the rounding error against the merged change's; 0 if nothing was rounded to fp8."""
        return (self.error / self.change) ** 0.5 if self.change else 0.0


@dataclass
class Checkpoint:
    """What to write: jobs, tensors that go along unchanged, and a marker of ComfyUI's where it is new."""

    source: Source
    changes: Plan
    layout: Layout
    jobs: list[Job]
    companions: list[Entry]
    marker: str | None
    specs: list[Spec] = field(init=False)

    def __post_init__(self) -> None:
        self.specs = [spec for job in self.jobs for spec in (*job.outputs, *job.output_scales) if spec]
        self.specs += [Spec(e.name, e.dtype, e.shape) for e in self.companions]
        if self.marker:
            self.specs.append(Spec(self.marker, FP8, (2,)))

    @property
    def bytes(self) -> int:
        return sum(spec.bytes for spec in self.specs)


def plan_checkpoint(
    source: Source, changes: Plan, *, dtype: SaveType | None = None, layout: Layout | None = None
) -> Checkpoint:
    """What writing `source` with `changes` takes.

    dtype: that of every weight; None keeps each tensor's own; "fp8_scaled" means e4m3 with one scale per
    weight for the linears of the blocks. layout: None keeps it, and a prefix of the names with it.

    Raises UserError for combinations that no published layout has.
    """
    old: Layout = "diffusers" if is_diffusers(source) else "bfl"
    layout = layout or old
    _refuse(source, layout, layout != old, dtype)
    config = transformer_config(source)
    first = source.keys()[0]
    prefix = source.entry(first).name.removesuffix(first) if layout == old else ""
    quantised = _quantisable(config) if dtype == FP8_SCALED else set()
    jobs = []
    for name, stored in stored_tensors(source).items():
        wanted = (FP8 if name in quantised else None) if dtype == FP8_SCALED else dtype
        rows = sum(part.shape[0] for part in stored.parts)
        outputs = [(prefix + key, size) for key, size in _output_names(config, name, rows, layout)]
        copied = layout == old and wanted is None and name not in changes
        jobs.append(_job(name, stored, outputs, dtype=wanted, copied=copied))
    used = {entry.name for job in jobs for entry in job.stored.scales if entry}
    others = [source.entry(k) for k in source.keys() if COMPANION.fullmatch(k)]  # noqa: SIM118
    companions = [e for e in others if e.name not in used] if dtype is None else []
    marker = f"{prefix}{MARKER}" if dtype == FP8_SCALED else None
    return Checkpoint(source, changes, layout, jobs, companions, marker)


def write_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    *,
    metadata: Mapping[str, str],
    device: torch.device | str = "cpu",
    on_job: Callable[[], object] = lambda: None,
) -> Loss:
    """Write the planned file; an older one at `out` stays whole until the new one is complete.

    out: a file, or for the diffusers layout a folder, which gets the base's config.json too.
    on_job: called after each of the checkpoint's jobs.

    Raises UserError when the disk is too small or refuses.
    """
    file = out
    if checkpoint.layout == "diffusers" and out.suffix != ".safetensors":
        file = out / FOLDER_FILE
    _check_space(file, checkpoint.bytes)
    loss = Loss()
    with atomic_write(file) as temporary:
        writer = Writer(temporary, checkpoint.specs, metadata)
        for entry in checkpoint.companions:
            writer.copy(entry.name, entry)
        if checkpoint.marker:
            writer.put(checkpoint.marker, torch.zeros(2, dtype=FP8))
        in_threads(_tasks(checkpoint, writer, torch.device(device), loss, on_job))
    config = checkpoint.source.files[0].parent / "config.json"
    if file != out and config.is_file():
        shutil.copyfile(config, out / "config.json")
    return loss


def _refuse(source: Source, layout: Layout, converted: bool, dtype: SaveType | None) -> None:
    if dtype == FP8_SCALED and layout == "diffusers":
        raise UserError(
            "fp8 with scales is not published in diffusers' layout. Use --layout bfl or another dtype."
        )
    scaled = any(key.endswith(SCALES) for key in source.keys())  # noqa: SIM118
    if scaled and converted and dtype is None:
        raise UserError(
            f"{source.path} is in fp8 with scales, which belong to its layout. "
            "Give --save-dtype to change the layout."
        )


def _quantisable(config: TransformerConfig) -> set[str]:
    """BFL tensor names of the weights that fp8_scaled rounds: those that loading in fp8 rounds too."""
    with torch.device("meta"):
        model = Transformer(config)
    return {f"{name}.weight" for name, module in model.named_modules() if is_quantisable(name, module)}


def _job(
    name: str,
    stored: Stored,
    outputs: Sequence[tuple[str, int]],
    *,
    dtype: torch.dtype | None,
    copied: bool,
) -> Job:
    """outputs: (key, rows). dtype: None keeps that of the inputs, and their scales."""
    first = stored.parts[0]
    specs = tuple(Spec(key, dtype or first.dtype, (rows, *first.shape[1:])) for key, rows in outputs)
    new_scales: list[Spec | None] = [None] * len(specs)
    if dtype == FP8:
        new_scales = [Spec(sibling(spec.key, SCALES[0]), torch.float32, ()) for spec in specs]
    elif dtype is None and any(stored.scales):
        new_scales = [entry and Spec(entry.name, entry.dtype, entry.shape) for entry in stored.scales]
    return Job(name, stored, specs, tuple(new_scales), copied)


def _output_names(
    config: TransformerConfig, name: str, rows: int, layout: Layout
) -> Iterator[tuple[str, int]]:
    """(key, rows) of the tensors that stand for a BFL tensor in a layout."""
    module, _, kind = name.rpartition(".")
    parts = diffusers_modules(module)
    if layout == "bfl" or not parts:
        return iter([(name, rows)])
    sizes = part_sizes(module, width=config.width, mlp_width=config.mlp_width) or (rows,)
    kind = "weight" if kind == "scale" else kind
    return ((f"{part}.{kind}", size) for part, size in zip(parts, sizes, strict=True))


def _check_space(file: Path, wanted: int) -> None:
    folder = next(p for p in file.absolute().parents if p.exists())
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise UserError(f"{file} needs {wanted / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB left.")


def _tasks(
    checkpoint: Checkpoint, writer: Writer, device: torch.device, loss: Loss, on_job: Callable[[], object]
) -> Iterator[Callable[[], object]]:
    """What threads can do beside each other; a tensor that is needed whole is done right here."""
    desk, size = Desk(), VALUES if device.type == "cpu" else VALUES_ON_GPU
    for job in checkpoint.jobs:
        changes = checkpoint.changes.get(job.name, ())
        if job.copied:
            yield partial(_copy, job, writer)
        elif _in_strips(job, checkpoint.layout) and by_rows(changes):
            ready = in_float32(changes)
            for strip in strips(job.stored.parts, job.outputs, size):
                yield partial(merge_strip, strip, ready, writer, desk, device)
        else:
            _run(job, checkpoint, writer, device, loss)
        on_job()


def _in_strips(job: Job, layout: Layout) -> bool:
    """Whether rows are written in the order they are stored in, without scales for the whole."""
    types = {part.dtype for part in (*job.stored.parts, *job.outputs)}
    swapped = layout == "diffusers" and is_swapped(job.name)
    return not types & set(FP8_DTYPES) and job.stored.swapped == swapped


def _copy(job: Job, writer: Writer) -> None:
    old = (*job.stored.parts, *job.stored.scales)
    for entry, spec in zip(old, (*job.outputs, *job.output_scales), strict=True):
        if entry and spec:
            writer.copy(spec.key, entry)


def _run(job: Job, checkpoint: Checkpoint, writer: Writer, device: torch.device, loss: Loss) -> None:
    """Do one job at once: read, merge, and write."""
    whole = job.stored.load(device)
    changes = checkpoint.changes.get(job.name)
    before = whole.clone() if changes and job.outputs[0].dtype in FP8_DTYPES else None
    if changes:
        merge_weight(whole, changes)
    for index, part in enumerate(
        _split(whole, job, checkpoint.layout == "diffusers" and is_swapped(job.name))
    ):
        written = _write(writer, part, job.outputs[index], job.output_scales[index])
        if before is not None:
            start = sum(spec.shape[0] for spec in job.outputs[:index])
            loss.error += torch.linalg.vector_norm(written.sub_(part)).item() ** 2
            loss.change += torch.linalg.vector_norm(before[start : start + len(part)].sub_(part)).item() ** 2


def _split(whole: Tensor, job: Job, swapped: bool) -> tuple[Tensor, ...]:
    whole = swap_halves(whole) if swapped else whole
    return whole.split([spec.shape[0] for spec in job.outputs])


def _write(writer: Writer, values: Tensor, spec: Spec, scale: Spec | None) -> Tensor:
    """Round and write float32 values; returns what was written, in float32 of its own, if that is fp8."""
    if spec.dtype not in FP8_DTYPES:
        writer.put(spec.key, values.to(spec.dtype))
        return values
    largest = torch.finfo(spec.dtype).max
    if scale is None:
        rounded = values.clamp(-largest, largest).to(spec.dtype)
        writer.put(spec.key, rounded)
        return rounded.float()
    count = max(1, torch.Size(scale.shape).numel())
    rows = 1 if count == 1 else len(values)
    blocks = values.reshape(rows, count // rows, -1)
    least, most = torch.aminmax(blocks, dim=-1, keepdim=True)
    factor = (torch.maximum(-least, most) / largest).clamp(min=1e-30).to(scale.dtype)
    scaled = (blocks / factor.float()).clamp_(-largest, largest)
    rounded = scaled.to(spec.dtype)
    writer.put(spec.key, rounded.view(values.shape))
    writer.put(scale.key, factor.view(scale.shape))
    return scaled.copy_(rounded).mul_(factor.float()).view(values.shape)
