"""What a LoRA file says about itself: `ss_*` fields as musubi-tuner and sd-scripts write them, and modelspec.

Every value is a string. None of them is a time, unless asked for: the same run gives the same bytes.
"""

import hashlib
import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from kontext.data.config import Dataset
from kontext.tensors import pieces

BASE_MODEL = "flux_kontext"
ARCHITECTURE = "flux-1-dev/lora"  # sd-scripts' spelling, which tools for LoRA files look for
WHOLE = "flux-1-dev"  # the same for a whole transformer
IMPLEMENTATION = "https://github.com/black-forest-labs/flux"
LEGACY_HASH_OFFSET, LEGACY_HASH_LENGTH = 0x100000, 0x10000
NETWORK = (
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)

# Options that are written as they are, under `ss_` and their name.
COPIED = (
    "output_name", "learning_rate", "gradient_checkpointing", "gradient_checkpointing_cpu_offload",
    "gradient_accumulation_steps", "lr_warmup_steps", "lr_scheduler", "network_module", "network_dim",
    "network_alpha", "network_dropout", "mixed_precision", "seed", "training_comment", "max_grad_norm",
    "weighting_scheme", "logit_mean", "logit_std", "mode_scale", "guidance_scale", "timestep_sampling",
    "sigmoid_scale", "discrete_flow_shift",
)  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What is known only once the run is set up. resolution: (width, height) in pixels of the dataset."""

    items: int
    batches: int
    epochs: int
    steps: int
    datasets: Sequence[Mapping[str, Any]]
    resolution: tuple[int, int]
    optimizer: str
    network_args: Mapping[str, Any]
    session: int
    started: float | None = None


@dataclass(frozen=True)
class Title:
    """The modelspec fields that a user may set."""

    title: str
    architecture: str | None = None
    resolution: str | None = None
    author: str | None = None
    description: str | None = None
    license: str | None = None
    tags: str | None = None
    timestep_range: tuple[int, int] | None = None


def training_fields(settings: Mapping[str, Any], facts: Facts) -> dict[str, str]:
    """The `ss_*` fields of a run. `settings` are the values of the command's options by name."""
    fields: dict[str, Any] = {f"ss_{name}": settings[name] for name in COPIED}
    fields |= {
        "ss_session_id": facts.session,
        "ss_num_train_items": facts.items,
        "ss_num_batches_per_epoch": facts.batches,
        "ss_num_epochs": facts.epochs,
        "ss_max_train_steps": facts.steps,
        "ss_base_model_version": BASE_MODEL,
        "ss_optimizer": facts.optimizer,
        "ss_fp8_base": settings["fp8"] or settings["fp8_scaled"] or settings["fp8_fast"],
        "ss_full_fp16": False,
        "ss_full_bf16": settings["full_bf16"],
        "ss_datasets": json.dumps(facts.datasets),
        "ss_network_args": json.dumps(facts.network_args),
        "ss_sd_model_name": settings["dit"].name,
        "ss_vae_name": settings["vae"].name if settings["vae"] else None,
    }
    if facts.started is not None:
        fields["ss_training_started_at"] = facts.started
    return {name: str(value) for name, value in fields.items()}


def network_fields(fields: Mapping[str, str]) -> dict[str, str]:
    """Of `fields`, what tools need to load the file; all that `--no-metadata` leaves."""
    return {name: fields[name] for name in NETWORK if name in fields}


def without_network(fields: Mapping[str, str]) -> dict[str, str]:
    """`fields` of a run that trains no adapter."""
    return {name: value for name, value in fields.items() if not name.startswith("ss_network_")}


def spec_fields(title: Title, facts: Facts) -> dict[str, str]:
    """The modelspec fields (https://github.com/Stability-AI/ModelSpec, version 1.0.0)."""
    fields = {
        "sai_model_spec": "1.0.0",
        "architecture": title.architecture or ARCHITECTURE,
        "implementation": IMPLEMENTATION,
        "title": title.title,
        "resolution": title.resolution or "x".join(map(str, facts.resolution)),
        "author": title.author,
        "description": title.description,
        "license": title.license,
        "tags": title.tags,
        "timestep_range": ",".join(map(str, title.timestep_range)) if title.timestep_range else None,
    }
    return {f"modelspec.{name}": value for name, value in fields.items() if value is not None}


def describe_datasets(datasets: Sequence[Dataset], with_references: Container[Path]) -> list[dict[str, Any]]:
    """`ss_datasets`: the blocks of the dataset file, paths by their last part; `with_references` are cache folders."""
    described = []
    for dataset in datasets:
        endings = dataset.caption_extension
        entry: dict[str, Any] = {
            "resolution": list(dataset.resolution),
            "caption_extension": endings[0] if len(endings) == 1 else list(endings),
            "batch_size_per_device": dataset.batch_size,
            "num_repeats": dataset.num_repeats,
            "enable_bucket": dataset.enable_bucket,
            "bucket_no_upscale": dataset.bucket_no_upscale,
        }
        for name in ("image_directory", "image_jsonl_file", "control_directory"):
            if (path := getattr(dataset, name)) is not None:
                entry[name] = path.name
        described.append(entry | {"has_control": dataset.cache_folder in with_references})
    return described


def at_save(facts: Facts, *, step: int, epoch: int, now: float) -> dict[str, str]:
    """The fields that change from file to file; times only if the run records them."""
    fields = {"ss_steps": str(step), "ss_epoch": str(epoch)}
    if facts.started is not None:
        fields["ss_training_finished_at"] = str(now)
        fields["modelspec.date"] = datetime.fromtimestamp(int(now)).isoformat()
    return fields


def hashes(tensors: Mapping[str, Tensor], fields: Mapping[str, str]) -> dict[str, str]:
    """The two hashes by which web interfaces recognise a LoRA, of the file with its `ss_*` fields alone."""
    kept = {name: value for name, value in fields.items() if name.startswith("ss_")}
    model, legacy, position = hashlib.sha256(), hashlib.sha256(), 0
    for number, piece in enumerate(pieces(tensors, kept)):
        if number:  # the first is the header
            model.update(piece)
        begin = max(LEGACY_HASH_OFFSET - position, 0)
        legacy.update(piece[begin : max(LEGACY_HASH_OFFSET + LEGACY_HASH_LENGTH - position, 0)])
        position += len(piece)
    return {"sshs_model_hash": model.hexdigest(), "sshs_legacy_hash": legacy.hexdigest()[:8]}
