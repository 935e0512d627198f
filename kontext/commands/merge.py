"""`kontext merge`: LoRAs into a checkpoint."""

from collections.abc import Sequence
from pathlib import Path

import torch

from kontext.checkpoints import open_source, transformer_config
from kontext.console import notice, progress, say
from kontext.device import resolve_device, resolve_dtype
from kontext.errors import UserError
from kontext.lora.merge import plan_merge, spread
from kontext.lora.report import read_adapters
from kontext.lora.rewrite import FP8_SCALED, Layout, SaveType, plan_checkpoint, write_checkpoint
from kontext.options.base import need
from kontext.options.merge import Merge


def run(options: Merge) -> None:
    """Do what the options ask for."""
    need(options, "dit", because="as the checkpoint to merge into")
    assert options.dit is not None
    dtype = options.save_dtype
    merge_into_checkpoint(
        options.dit,
        options.lora_weight,
        options.lora_multiplier,
        options.save_merged_model,
        include_patterns=options.include_patterns,
        exclude_patterns=options.exclude_patterns,
        dtype=dtype if dtype is None or dtype == FP8_SCALED else resolve_dtype(dtype),
        layout=options.layout,
        device=resolve_device(options.device),
    )


def merge_into_checkpoint(
    dit: Path,
    loras: Sequence[Path],
    multipliers: Sequence[float],
    out: Path,
    *,
    include_patterns: Sequence[str] = (),
    exclude_patterns: Sequence[str] = (),
    dtype: SaveType | None = None,
    layout: Layout | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Write the transformer in `dit` with `loras` merged into it to `out`, telling what happens.

    Raises UserError for files that do not fit, and when there is nothing to merge.
    """
    if not loras:
        raise UserError("Nothing to merge: give at least one --lora-weight.")
    strengths = spread(multipliers, len(loras))
    source = open_source(dit, "transformer")
    adapters = read_adapters(loras, transformer_config(source))
    changes = plan_merge(
        adapters, strengths, include_patterns=include_patterns, exclude_patterns=exclude_patterns
    )
    parts = [f"{strength:g} * {path.name}" for strength, path in zip(strengths, loras, strict=True)]
    metadata = {**source.metadata, "merged_from": " + ".join([dit.name, *parts])}
    checkpoint = plan_checkpoint(source, changes, dtype=dtype, layout=layout)
    with progress("Merging", len(checkpoint.jobs), unit="tensor") as bar:
        loss = write_checkpoint(checkpoint, out, metadata=metadata, device=device, on_job=bar.advance)
    say(f"{out}: {len(changes)} of {len(checkpoint.jobs)} tensors changed, {checkpoint.bytes / 1e9:.2f} GB.")
    if loss.relative:
        notice(
            f"Rounding to 8 bits moved the merged weights by {loss.relative:.0%} of what the LoRA adds. "
            "--save-dtype bfloat16 keeps it whole."
        )
