"""Which models, in which precision and where, as the options of a command say."""

import torch

from kontext.device import resolve_dtype
from kontext.generation.parts import ModelFiles, Runtime
from kontext.memory.placement import Placement
from kontext.options.generate import Generate
from kontext.options.train import Train


def model_files(options: Generate | Train) -> ModelFiles:
    return ModelFiles(
        dit=options.dit,
        vae=options.vae,
        text_encoder1=options.text_encoder1,
        text_encoder2=options.text_encoder2,
        tokenizer1=options.tokenizer1,
        tokenizer2=options.tokenizer2,
    )


def model_runtime(options: Generate | Train, device: torch.device, *, dtype: str, keep: bool) -> Runtime:
    """dtype: the transformer's, by name; keep: as in Runtime."""
    return Runtime(
        device=device,
        dtype=resolve_dtype(dtype),
        vae_dtype=resolve_dtype(options.vae_dtype),
        vae_tiling=options.vae_tiling,
        quantization="fp8_scaled" if options.fp8_scaled else "fp8" if options.fp8 else None,
        attention=options.attn_mode,
        split_attention=options.split_attn,
        fp8_t5=options.fp8_t5,
        t5_max_length=options.t5_max_length,
        keep=keep,
        placement=placement(options, device),
    )


def placement(options: Generate | Train, device: torch.device) -> Placement:
    """The options' placement on `device`. On a CPU there is no other memory that modulation could be taken to."""
    swap = options.blocks_to_swap
    return Placement(
        swap="max" if swap == "max" else int(swap),
        modulation=options.modulation == "auto" and device.type == "cuda",
    )
