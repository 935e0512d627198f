"""What a run of `kontext train` that goes on from a state must have in common with the one that saved it."""

import hashlib
import json
from typing import Any

from kontext.commands import train_network
from kontext.commands import train_values as values
from kontext.data.batches import Batches
from kontext.options.train import Train
from kontext.training.plan import Plan

# Options that change the course of training: a run goes on from a state as if never stopped only with the same values.
COURSE = (
    "network_module", "network_dim", "network_alpha", "network_dropout", "network_args", "timestep_sampling",
    "sigmoid_scale", "discrete_flow_shift", "weighting_scheme", "logit_mean", "logit_std", "mode_scale",
    "min_timestep", "max_timestep", "preserve_distribution_shape", "num_timestep_buckets", "guidance_scale",
    "optimizer_type", "optimizer_args", "learning_rate", "lr_scheduler", "lr_warmup_steps", "lr_decay_steps",
    "lr_scheduler_num_cycles", "lr_scheduler_power", "lr_scheduler_timescale", "lr_scheduler_min_lr_ratio",
    "max_grad_norm", "scale_weight_norms", "fp8", "fp8_scaled", "fp8_fast", "int8", "int8_fast", "nf4",
)  # fmt: skip
SELDOM = (
    "ema_decay",
    "full_bf16",
    "lr_scheduler_type",
    "lr_scheduler_args",
)  # recorded only where they are given
# Learning rates that do not depend on where the run ends.
UNENDING = ("constant", "constant_with_warmup", "inverse_sqrt")
# Of these and the other settings, those without which a state means nothing.
FIXED = (
    "network_module", "network_dim", "network_alpha", "network_args", "optimizer_type", "optimizer_args", "seed",
    "batches per step", "dataset",
)  # fmt: skip


def course(options: Train, batches: Batches, plan: Plan, seed: int) -> dict[str, Any]:
    """All that decides how training goes, by the user's names for it."""
    entries = [(entry, group) for group in batches.groups for entry in group.entries]
    items = [entry.item for entry, _ in entries]
    shape = [(entry.item.key, entry.sizes, group.batch_size, group.repeats) for entry, group in entries]
    return {
        **{name: getattr(options, name) for name in COURSE},
        **train_network.beginnings(options),
        **{name: value for name in SELDOM if (value := getattr(options, name))},
        **_length(options, plan),
        "seed": seed,
        "dtype": values.precision(options),
        "dit": options.dit.name,
        "batches per step": plan.per_step,
        "dataset": _digest(shape),
        "pictures and encoders": batches.sources[:16],
        "captions": _digest([(item.caption, item.others) for item in items]),
        "caption and reference dropout": sorted({(item.dropout, item.control_dropout) for item in items}),
        "masked items": sum(item.mask is not None for item in items),
    }


def _length(options: Train, plan: Plan) -> dict[str, int]:
    """How long the run is, where the learning rate goes by it: a longer one would have had others before, too."""
    ends = options.lr_scheduler_type is None and options.lr_scheduler not in UNENDING
    return {"max_train_steps": plan.steps} if ends or 0 < options.lr_warmup_steps < 1 else {}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
