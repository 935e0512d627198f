"""`kontext merge`: LoRAs into a checkpoint, into one LoRA, or a LoRA out of checkpoints."""

from collections.abc import Sequence
from pathlib import Path

import torch

from kontext.checkpoints import open_source, transformer_config
from kontext.commands.merge_loras import average_loras, combine_loras, extract_lora
from kontext.console import notice, progress, say
from kontext.device import resolve_device, resolve_dtype
from kontext.errors import UserError
from kontext.lora.ema import constant, power
from kontext.lora.merge import plan_merge, spread
from kontext.lora.report import read_adapters
from kontext.lora.rewrite import FP8_SCALED, Layout, SaveType, plan_checkpoint, write_checkpoint
from kontext.lora.strength import Multiplier
from kontext.options.merge import Merge


def run(options: Merge) -> None:
    """Do what the options ask for."""
    if options.extract is not None:
        _extract(options, options.extract)
    elif options.ema_beta is not None or options.ema_sigma_rel is not None:
        _average(options)
    elif options.dit is not None:
        merge_into_checkpoint(
            options.dit,
            options.lora_weight,
            options.lora_multiplier,
            options.save_merged_model,
            include_patterns=options.include_patterns,
            exclude_patterns=options.exclude_patterns,
            dtype=_save_type(options),
            layout=options.layout,
            device=resolve_device(options.device),
        )
    else:
        _combine(options)


def merge_into_checkpoint(
    dit: Path,
    loras: Sequence[Path],
    multipliers: Sequence[Multiplier],
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
    _need_loras(loras)
    strengths = spread(multipliers, len(loras))
    source = open_source(dit, "transformer")
    adapters = read_adapters(loras, transformer_config(source))
    changes = plan_merge(
        adapters, strengths, include_patterns=include_patterns, exclude_patterns=exclude_patterns
    )
    parts = [f"{strength} * {path.name}" for strength, path in zip(strengths, loras, strict=True)]
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


def _combine(options: Merge) -> None:
    _need_loras(options.lora_weight)
    if options.layout is not None:
        raise UserError("--layout is for checkpoints: give --dit to merge into one, or --format for a LoRA.")
    combine_loras(
        options.lora_weight,
        options.lora_multiplier,
        options.save_merged_model,
        include_patterns=options.include_patterns,
        exclude_patterns=options.exclude_patterns,
        rank=options.rank,
        format=options.format,
        dtype=_lora_type(options),
    )


def _extract(options: Merge, tuned: Path) -> None:
    if options.dit is None or options.rank is None:
        raise UserError("--extract needs --dit, the checkpoint it started from, and --rank.")
    extract_lora(
        options.dit,
        tuned,
        options.save_merged_model,
        include_patterns=options.include_patterns,
        exclude_patterns=options.exclude_patterns,
        rank=options.rank,
        format=options.format,
        dtype=_lora_type(options),
        device=resolve_device(options.device),
    )


def _average(options: Merge) -> None:
    _need_loras(options.lora_weight)
    if options.ema_sigma_rel is not None:
        if options.ema_beta is not None:
            raise UserError("Give --ema-beta or --ema-sigma-rel, not both.")
        decay = power(options.ema_sigma_rel)
    else:
        assert options.ema_beta is not None
        decay = constant(options.ema_beta, options.ema_beta2)
    average_loras(options.lora_weight, options.save_merged_model, decay, dtype=_lora_type(options))


def _need_loras(loras: Sequence[Path]) -> None:
    if not loras:
        raise UserError("Nothing to merge: give at least one --lora-weight.")


def _save_type(options: Merge) -> SaveType | None:
    dtype = options.save_dtype
    return dtype if dtype is None or dtype == FP8_SCALED else resolve_dtype(dtype)


def _lora_type(options: Merge) -> torch.dtype | None:
    """Raises UserError for 8 bits, in which no LoRA is published."""
    if options.save_dtype == FP8_SCALED:
        raise UserError("--save-dtype fp8_scaled is for checkpoints: a LoRA is float32, bfloat16 or float16.")
    return None if options.save_dtype is None else resolve_dtype(options.save_dtype)
