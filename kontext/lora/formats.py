"""Writing LoRA in the layouts of other programs: kohya, diffusers, BFL's and ComfyUI's names."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from kontext.checkpoints.names import SWAPPED, diffusers_modules, part_sizes
from kontext.lora.deltas import LowRank, swap_halves
from kontext.model.transformer import TransformerConfig

Format = Literal["kohya", "diffusers", "bfl", "comfy"]


def format_lora(
    changes: Mapping[str, LowRank],
    format: Format,
    config: TransformerConfig,
    dtype: torch.dtype,
    magnitudes: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The tensors of a file with `changes` by BFL module.

    kohya: `lora_unet_...lora_down.weight` with alphas (musubi-tuner, sd-scripts, ComfyUI, diffusers).
    diffusers: `transformer....lora_A.weight`, fused layers split, scales in the tensors (diffusers, PEFT).
    bfl: `double_blocks....lora_A.weight` with alphas. comfy: the same below `diffusion_model.`.

    magnitudes: by module, (out, 1), of DoRAs; `lora_magnitude_vector` in diffusers' format, else `dora_scale`.
    """
    tensors: dict[str, Tensor] = {}
    magnitudes = magnitudes or {}
    for module, change in changes.items():
        if format == "diffusers":
            tensors |= _diffusers(module, change, config, magnitudes.get(module))
            continue
        prefix = "diffusion_model." if format == "comfy" else ""
        stem = f"lora_unet_{module.replace('.', '_')}" if format == "kohya" else f"{prefix}{module}"
        tensors |= _named(
            stem, change, *(("lora_down", "lora_up") if format == "kohya" else ("lora_A", "lora_B"))
        )
        if module in magnitudes:
            tensors[f"{stem}.dora_scale"] = magnitudes[module]
    return {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}


def _named(stem: str, change: LowRank, down: str, up: str) -> dict[str, Tensor]:
    return {
        f"{stem}.alpha": torch.tensor(change.scale * change.rank),
        f"{stem}.{down}.weight": change.down,
        f"{stem}.{up}.weight": change.up,
    }


def _diffusers(
    module: str, change: LowRank, config: TransformerConfig, magnitude: Tensor | None
) -> dict[str, Tensor]:
    """One module, or one for each part of a fused layer. A part whose change is nothing is left out."""
    names = diffusers_modules(module)
    sizes = part_sizes(module, width=config.width, mlp_width=config.mlp_width) or (change.shape[0],)
    up = swap_halves(change.up) if module == SWAPPED else change.up
    tensors = {}
    for name, rows in zip(names, up.float().split(sizes), strict=True):
        used = _used(rows) or ([] if magnitude is None else [0])
        if used:
            tensors[f"transformer.{name}.lora_A.weight"] = change.down[used]
            tensors[f"transformer.{name}.lora_B.weight"] = change.scale * rows[:, used]
    if magnitude is not None:
        lengths = swap_halves(magnitude) if module == SWAPPED else magnitude
        for name, part in zip(names, lengths.squeeze(1).split(sizes), strict=True):
            tensors[f"transformer.{name}.lora_magnitude_vector"] = part
    return tensors


def _used(up: Tensor) -> Sequence[int]:
    """Ranks that reach these rows: of a block-diagonal up, those of its own block."""
    return up.any(0).nonzero().flatten().tolist()
