"""Writes the small world's weights in the published layouts, so that they take the real loading path."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from kontext.files import save_tensors
from kontext.model.autoencoder import Autoencoder
from small_world.base import SmallWorld


def _save(path: Path, module: nn.Module, *, prefix: str = "", skip: tuple[str, ...] = ()) -> None:
    """The weights of `module` in float16, their names after `prefix`."""
    tensors = {
        prefix + name: tensor.to(torch.float16)
        for name, tensor in module.state_dict().items()
        if tensor.is_floating_point() and name not in skip
    }
    save_tensors(path, tensors, {"kontext.world": "small"})


def write_models(folder: Path, autoencoder: Autoencoder, world: SmallWorld) -> None:
    """`ae` and `dit` in Black Forest Labs' names, `t5` and `clip` in those of ComfyUI's text encoders."""
    _save(folder / "ae.safetensors", autoencoder)
    _save(folder / "dit.safetensors", world.transformer)
    _save(folder / "t5.safetensors", world.t5, skip=("encoder.embed_tokens.weight",))
    _save(folder / "clip.safetensors", world.clip, prefix="text_model.")
