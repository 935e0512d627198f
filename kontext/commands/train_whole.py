"""What `kontext train --network-module none` takes and refuses: training of the transformer itself."""

import os

import torch

from kontext.checkpoints import open_source
from kontext.device import resolve_dtype
from kontext.errors import UserError
from kontext.lora.as_loaded import AsLoaded
from kontext.options.shared import WEIGHTS
from kontext.options.train import Train
from kontext.training.names import Names
from kontext.training.optimizers import class_of
from kontext.training.team import Team

# Options that say nothing without adapters, or that weights which change do not allow.
ADAPTERS = "it is about adapters: leave it out"
FROZEN = "weights that are trained cannot be {}: leave it out"
REFUSED = {
    "network_dim": ADAPTERS,
    "network_alpha": ADAPTERS,
    "network_dropout": ADAPTERS,
    "network_weights": "give the checkpoint to start from as --dit",
    "dim_from_weights": ADAPTERS,
    "base_weights": "merge them first with kontext merge, and give the result as --dit",
    "scale_weight_norms": ADAPTERS,
    **{name: FROZEN.format("kept in few bits") for form in WEIGHTS for name in form},
    "blocks_to_swap": FROZEN.format("streamed from the host"),
}

# Optimizers that treat every number by itself.
ELEMENTWISE = ("torch.AdamW", "torch.Adam", "torch.SGD", "schedulefree.AdamWScheduleFree")
SPLITTABLE = ("adamw", "adamwschedulefree", "sgd")  # names of such


def is_whole(options: Train) -> bool:
    """Whether the transformer itself is trained."""
    return options.network_module == "none"


def stored(options: Train) -> torch.dtype:
    """What trained weights of the transformer are kept in."""
    return torch.bfloat16 if options.full_bf16 else torch.float32


def check(options: Train) -> None:
    """Raises UserError for options that do not go with what is trained, and where the base would be written over."""
    if not is_whole(options):
        if options.full_bf16:
            raise UserError("--full-bf16 is for --network-module none: adapters are always float32.")
        return
    for name, remedy in REFUSED.items():
        if name in options.model_fields_set and getattr(options, name) not in (False, None, 0, "0", []):
            raise UserError(f"--{name.replace('_', '-')} with --network-module none: {remedy}.")
    if options.full_bf16 and "dtype" in options.model_fields_set and options.dtype != "bfloat16":
        raise UserError(f"--full-bf16 and --dtype {options.dtype} contradict each other: leave out one.")
    final = names(options).final()
    if final.exists() and options.dit.exists() and final.samefile(options.dit):
        raise UserError(f"{final} is --dit itself: give another --output-name or --output-dir.")


def is_split(options: Train, team: Team) -> bool:
    """Whether the processes share one model: FSDP, as `accelerate launch --use_fsdp` asks for it.

    Raises UserError for what it does not go with.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true" or team.size == 1:
        return False
    if not is_whole(options):
        raise UserError(
            "FSDP is for --network-module none: launch the training of adapters without --use_fsdp."
        )
    kind = class_of(options.optimizer_type)[0]
    if f"{kind.__module__.partition('.')[0]}.{kind.__name__}" not in ELEMENTWISE:
        raise UserError(
            f"--optimizer-type {options.optimizer_type} treats the numbers of a weight together, and with FSDP each "
            f"process has only a part of them. Use {', '.join(SPLITTABLE[:-1])} or {SPLITTABLE[-1]} (--full-bf16 halves "
            "what they keep in memory), or launch without --use_fsdp."
        )
    return True


def layout(options: Train) -> AsLoaded:
    """How the transformer is written."""
    dtype = options.save_precision
    return AsLoaded(open_source(options.dit, "transformer"), resolve_dtype(dtype) if dtype else None)


def names(options: Train) -> Names:
    """Names of the run's files: a transformer that was a folder becomes one again."""
    if is_whole(options) and layout(options).is_folder:
        return Names(options.output_dir, options.output_name, weights="")
    return Names(options.output_dir, options.output_name)
