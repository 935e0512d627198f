"""Which models, in which precision and where, as the options of a command say."""

import torch

from kontext.console import notice
from kontext.device import told_precision
from kontext.generation.parts import ModelFiles, Runtime
from kontext.memory.placement import Placement
from kontext.options.base import flag_name
from kontext.options.generate import Generate
from kontext.options.shared import WEIGHTS
from kontext.options.train import Train
from kontext.quant import FP8, Mode, supported

RESTORED: dict[Mode, tuple[Mode, torch.dtype]] = {
    "fp8_fast": ("fp8_scaled", FP8),
    "int8_fast": ("int8", torch.int8),
}
"""Forms with products in 8 bits: what takes their place where a device has no products of such numbers."""


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
    """dtype: the transformer's, by name; keep: as in Runtime. Says what on this device is not as asked."""
    precision = told_precision(dtype, device)
    return Runtime(
        device=device,
        dtype=precision.computing,
        kept=precision.kept,
        vae_dtype=told_precision(options.vae_dtype, device, "--vae-dtype").computing,
        vae_tiling=options.vae_tiling,
        quantization=told_quantization(options, device),
        attention=options.attn_mode,
        split_attention=options.split_attn,
        compiled=options.compile,
        fp8_t5=options.fp8_t5,
        t5_max_length=options.t5_max_length,
        keep=keep,
        placement=placement(options, device),
    )


def quantization(options: Generate | Train, device: torch.device) -> Mode | None:
    """How weights are kept: as asked, but that products in 8 bits need a device that has them."""
    mode = _form(options)
    if mode not in RESTORED:
        return mode
    instead, dtype = RESTORED[mode]
    return mode if supported(device, dtype) else instead


def told_quantization(options: Generate | Train, device: torch.device) -> Mode | None:
    """The same, with a notice where it is not what was asked for."""
    asked, found = _form(options), quantization(options, device)
    if asked and found and found != asked:
        notice(
            f"{flag_name(asked)}: {device} has no fast products of such numbers (fp8: RTX 40, H100 and later), or this "
            f"PyTorch has none for it. The weights are kept as with {flag_name(found)} and multiplied in the "
            "precision of --dtype: more exact, not faster."
        )
    return found


def _form(options: Generate | Train) -> Mode | None:
    """The form of weights that the options name."""
    return next((name for form in WEIGHTS for name in form if getattr(options, name)), None)


def placement(options: Generate | Train, device: torch.device) -> Placement:
    """The options' placement on `device`. On a CPU there is no other memory that modulation could be taken to."""
    swap = options.blocks_to_swap
    return Placement(
        swap="max" if swap == "max" else int(swap),
        modulation=options.modulation == "auto" and device.type == "cuda",
    )
