"""What other programs make of an adapter file: the weights of a small FLUX transformer after it."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from kontext.lora.files import AdapterFile, read_adapter
from kontext.lora.merge import merging
from tests import tiny
from tests.bfl_names import bfl_transformer
from tests.lora.models import CONFIG

TOLERANCE = 1e-5

# One adapter covers every kind of module: fused and single, inside and outside the blocks.
DIFFUSERS_MODULES = (
    [f"transformer_blocks.0.attn.{m}" for m in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")]
    + [f"transformer_blocks.1.attn.{m}" for m in ("add_q_proj", "add_k_proj", "add_v_proj")]
    + [f"transformer_blocks.1.{m}" for m in ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj")]
    + ["transformer_blocks.0.ff_context.net.2", "transformer_blocks.0.norm1.linear"]
    + [f"single_transformer_blocks.1.{m}" for m in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    + ["single_transformer_blocks.0.proj_out", "single_transformer_blocks.0.norm.linear"]
    + ["x_embedder", "context_embedder", "norm_out.linear", "proj_out"]
    + [f"time_text_embed.{e}_embedder.linear_{i}" for e in ("timestep", "text", "guidance") for i in (1, 2)]
)
BFL_MODULES = (
    [f"double_blocks.0.{m}" for m in ("img_attn.qkv", "txt_attn.qkv", "img_attn.proj", "txt_attn.proj")]
    + [f"double_blocks.1.{m}" for m in ("img_mlp.0", "img_mlp.2", "txt_mlp.0", "txt_mlp.2", "img_mod.lin")]
    + ["single_blocks.0.linear1", "single_blocks.1.linear2", "single_blocks.1.modulation.lin"]
    + ["img_in", "txt_in", "time_in.in_layer", "final_layer.linear", "final_layer.adaLN_modulation.1"]
)


def diffusers_model() -> Any:
    return tiny.make_transformer(seed=1)


def bfl_weights(model: Any) -> dict[str, Tensor]:
    """A diffusers model's weights under BFL's names."""
    weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
    return bfl_transformer(weights, CONFIG.double_blocks, CONFIG.single_blocks)


def base_weights() -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in _base_weights().items()}


@cache
def _base_weights() -> dict[str, Tensor]:
    return bfl_weights(diffusers_model())


def randomise_adapter(model: Any, seed: int = 3) -> None:
    """Every trainable parameter random, so that the change is about as large as the weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                noise = torch.randn(p.shape, generator=generator)
                p.copy_(noise * p[0].numel() ** -0.5 if p.ndim > 1 else 1 + 0.2 * noise)


def merged_by_us(adapter: AdapterFile, strength: float = 1.0) -> dict[str, Tensor]:
    edit = merging([adapter], [strength])
    return {name: edit(name, weight) for name, weight in base_weights().items()}


def assert_same_change(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> int:
    """Both change the same tensors of the base, by the same amounts; returns how many."""
    base, changed = base_weights(), 0
    assert found.keys() == expected.keys() == base.keys()
    for name, before in base.items():
        change = expected[name] - before
        if change.norm() <= 1e-6 * before.norm():
            assert (found[name] - before).norm() <= 1e-6 * before.norm(), name
            continue
        error = (found[name] - expected[name]).norm() / change.norm()
        assert error <= TOLERANCE, f"{name}: {error}"
        changed += 1
    return changed


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, path, metadata=dict(metadata or {}))
    return path


def read(path: Path) -> AdapterFile:
    return read_adapter(path, CONFIG)


def renamed(tensors: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    return {rename(k): v for k, v in tensors.items()}
