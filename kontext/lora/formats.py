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
    changes: Mapping[str, LowRank], format: Format, config: TransformerConfig, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of a file with `changes` by BFL module.

    kohya: `lora_unet_...lora_down.weight` with alphas (musubi-tuner, sd-scripts, ComfyUI, diffusers).
    diffusers: `transformer....lora_A.weight`, fused layers split, scales in the tensors (diffusers, PEFT).
    bfl: `double_blocks....lora_A.weight` with alphas. comfy: the same below `diffusion_model.`.
    """
    tensors: dict[str, Tensor] = {}
    for module, change in changes.items():
        if format == "diffusers":
            tensors |= _diffusers(module, change, config)
        elif format == "kohya":
            tensors |= _named(f"lora_unet_{module.replace('.', '_')}", change, "lora_down", "lora_up")
        else:
            prefix = "diffusion_model." if format == "comfy" else ""
            tensors |= _named(f"{prefix}{module}", change, "lora_A", "lora_B")
    return {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}


def _named(stem: str, change: LowRank, down: str, up: str) -> dict[str, Tensor]:
    return {
        f"{stem}.alpha": torch.tensor(change.scale * change.rank),
        f"{stem}.{down}.weight": change.down,
        f"{stem}.{up}.weight": change.up,
    }


def _diffusers(module: str, change: LowRank, config: TransformerConfig) -> dict[str, Tensor]:
    """One module, or one for each part of a fused layer. A part whose change is nothing is left out."""
    names = diffusers_modules(module)
    sizes = part_sizes(module, width=config.width, mlp_width=config.mlp_width) or (change.shape[0],)
    up = swap_halves(change.up) if module == SWAPPED else change.up
    tensors = {}
    for name, rows in zip(names, up.float().split(sizes), strict=True):
        used = _used(rows)
        if used:
            tensors[f"transformer.{name}.lora_A.weight"] = change.down[used]
            tensors[f"transformer.{name}.lora_B.weight"] = change.scale * rows[:, used]
    return tensors


def _used(up: Tensor) -> Sequence[int]:
    """Ranks that reach these rows: of a block-diagonal up, those of its own block."""
    return up.any(0).nonzero().flatten().tolist()
