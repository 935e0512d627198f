"""What a run writes into its files of weights about itself."""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from torch.optim import Optimizer

from kontext.commands import train_course, train_network, train_whole
from kontext.commands import train_values as values
from kontext.data.batches import Batches
from kontext.data.config import load_datasets
from kontext.options.train import Train
from kontext.training.arguments import parse_arguments
from kontext.training.export import Export
from kontext.training.metadata import (
    WHOLE,
    Facts,
    Title,
    describe_datasets,
    spec_fields,
    training_fields,
    without_network,
)
from kontext.training.plan import Plan
from kontext.training.trained import Adapters, Trained


def export(
    options: Train,
    trained: Trained,
    batches: Batches,
    plan: Plan,
    *,
    seed: int,
    optimizer: Optimizer,
    weights: Callable[[], AbstractContextManager[None]],
) -> Export:
    """What writes the files, with all that is to be said about them."""
    about = _facts(options, batches, plan, seed, optimizer)
    settings = options.model_dump() | {
        "network_module": train_network.NETWORK_MODULES.get(options.network_module),
        "network_alpha": train_network.network(options).alpha,
        "mixed_precision": values.MIXED_NAMES.get(values.precision(options), "no"),
        "seed": seed,
        "lr_warmup_steps": values.steps(options.lr_warmup_steps, plan.steps),
    }
    if options.dim_from_weights and isinstance(trained, Adapters):
        settings |= _sizes(trained)
    fields = training_fields(settings, about)
    return Export(
        trained=trained,
        facts=about,
        fields=without_network(fields) if train_whole.is_whole(options) else fields,
        spec=spec_fields(_title(options), about),
        brief=options.no_metadata,
        plan=plan,
        weights=weights,
    )


def _sizes(trained: Adapters) -> dict[str, int | float | str]:
    """Rank and alpha as they are, or `Dynamic` where modules differ, as sd-scripts' tools write it."""
    found = {
        "network_dim": {adapter.rank for adapter in trained.adapters.values()},
        "network_alpha": {adapter.alpha for adapter in trained.adapters.values()},
    }
    return {name: sizes.pop() if len(sizes) == 1 else "Dynamic" for name, sizes in found.items()}


def _facts(options: Train, batches: Batches, plan: Plan, seed: int, optimizer: Optimizer) -> Facts:
    datasets = load_datasets(options.dataset_config)
    entries = [entry for group in batches.groups for entry in group.entries]
    with_references = {entry.latents.parent for entry in entries if entry.references}
    kind = type(optimizer)
    session = hashlib.sha256(
        json.dumps(train_course.course(options, batches, plan, seed), sort_keys=True).encode()
    )
    return Facts(
        items=batches.items_per_epoch,
        batches=plan.batches,
        epochs=plan.epochs,
        steps=plan.steps,
        datasets=describe_datasets(datasets, with_references),
        resolution=max((dataset.resolution for dataset in datasets), key=lambda size: size[0] * size[1]),
        optimizer=f"{kind.__module__}.{kind.__qualname__}({','.join(options.optimizer_args)})",
        network_args=parse_arguments(options.network_args, "--network-args"),
        session=int(session.hexdigest()[:8], 16),
        started=time.time() if options.metadata_time else None,
    )


def _title(options: Train) -> Title:
    limited = options.min_timestep > 0 or options.max_timestep < 1000
    return Title(
        title=options.metadata_title or options.output_name,
        architecture=options.metadata_arch or (WHOLE if train_whole.is_whole(options) else None),
        resolution=options.metadata_reso,
        author=options.metadata_author,
        description=options.metadata_description,
        license=options.metadata_license,
        tags=options.metadata_tags,
        timestep_range=(options.min_timestep, options.max_timestep) if limited else None,
    )
