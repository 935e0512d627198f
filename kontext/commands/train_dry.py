"""`kontext train --dry-run`: what can fail later is tried now, and what the run will take is shown."""

import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kontext import console
from kontext.backends import attention_backend
from kontext.checkpoints import load_clip_tokenizer, load_t5_tokenizer
from kontext.commands import train_average, train_needs
from kontext.commands import train_values as values
from kontext.commands.memory_table import show_memory, size
from kontext.commands.train_needs import Outline
from kontext.data.batches import Batches, Group
from kontext.data.cache import read_header
from kontext.data.config import load_datasets
from kontext.errors import UserError
from kontext.memory.estimate import TRAINING_STEP
from kontext.memory.needs import in_strips
from kontext.model.latents import PATCH
from kontext.model.transformer import TransformerConfig
from kontext.options.train import Train
from kontext.training.forecast import Forecast, Sizes, forecast
from kontext.training.names import Names
from kontext.training.network import Network
from kontext.training.plan import Plan
from kontext.training.session import Start
from kontext.training.state import check_network
from kontext.training.team import Team
from kontext.training.validation import Held

HEADER = 200  # bytes of a file for each tensor, beside the tensor
FIELDS = 20_000  # bytes of a file's other metadata
SPARE = 1.02  # of the disk: reports, logs and sample pictures


@dataclass(frozen=True)
class Run:
    """A run that is to be: what `kontext train` has found out by reading options and caches."""

    names: Names
    network: Network
    start: Start
    batches: Batches
    held: Held | None
    plan: Plan
    team: Team
    seed: int


def dry_run(options: Train, run: Run, outline: Outline) -> None:
    """Raises UserError for whatever the run would fail with."""
    attention_backend(options.attn_mode)
    for batches in (run.batches, *([run.held.batches] if run.held else [])):
        _check_caches(batches, outline.config)
    parameters = outline.trained.parameters
    updates = values.updates(options, run.network, parameters, run.plan, run.team.device)
    train_average.average(options, updates)
    if run.start.folder is not None:
        check_network(run.start.folder, parameters)
    if outline.samples:
        assert options.text_encoder1 and options.text_encoder2
        load_t5_tokenizer(options.tokenizer1, options.text_encoder1)
        load_clip_tokenizer(options.tokenizer2, options.text_encoder2)
    saves = _forecast(options, run, outline)
    _show(options, run, outline, saves)
    needed = in_strips(outline.needs, options.vae_tiling == "on")
    show_memory(needed.estimate(train_needs.asked(options, run.team)), always=TRAINING_STEP)
    _check_disk(run.names, saves)
    console.say("Dry run: nothing was found that would fail. Nothing has been trained.")


def _check_caches(batches: Batches, config: TransformerConfig) -> None:
    """Raises UserError for caches of encoders that do not go with the transformer."""
    for group in batches.groups:
        entry = group.entries[0]
        latents, text = read_header(entry.latents), train_needs.text_header(group)
        assert latents is not None, "it was read when the caches were checked"
        found = {
            entry.latents: (latents.shapes["latents"][0] * PATCH**2, config.in_channels, "channels a token"),
            entry.text: (text.shapes["t5_vec"][1], config.context_width, "channels from T5"),
        }
        for path, (there, wanted, what) in found.items():
            if there != wanted:
                raise UserError(
                    f"{path} has {there} {what}, but the transformer takes {wanted}: it was cached with another model."
                )


def _forecast(options: Train, run: Run, outline: Outline) -> Forecast:
    tensors, sizes = len(outline.trained.parameters), outline.needs.trained
    files = 2 if options.ema_decay is not None else 1
    adapter = outline.trained.file_bytes + 2 * tensors * HEADER + FIELDS
    state = (
        outline.processes * (sizes.nbytes + sizes.average + sizes.optimizer) + 4 * tensors * HEADER + FIELDS
    )
    return forecast(
        values.rules(options),
        run.plan,
        Sizes(files * adapter, state),
        first=run.start.progress.step,
        best=run.held is not None,
    )


def _check_disk(names: Names, saves: Forecast) -> None:
    free, wanted = shutil.disk_usage(names.folder).free, round(saves.bytes * SPARE)
    if free < wanted:
        raise UserError(
            f"--output-dir {names.folder}: the run comes to {size(wanted)} of files, and the disk has {size(free)} left. Keep "
            "fewer (--save-last-n-epochs, --save-last-n-steps), or make room."
        )


def _show(options: Train, run: Run, outline: Outline, saves: Forecast) -> None:
    columns = ("dataset", "items", "with reference", "without", "repeats")
    console.table("Items", columns, list(_items(options, run.batches)), asked=True)
    console.table("Buckets", ("size", "references", "items", "batches"), _buckets(run.batches), asked=True)
    console.table("Run", ("", ""), list(_lengths(options, run, outline, saves)), asked=True)


def _items(options: Train, batches: Batches) -> Iterable[tuple[object, ...]]:
    all_entries = [entry for group in batches.groups for entry in group.entries]
    for dataset in load_datasets(options.dataset_config):
        entries = [entry for entry in all_entries if entry.latents.parent == dataset.cache_folder]
        referenced = sum(bool(entry.references) for entry in entries)
        if entries:
            yield (
                str(dataset.source),
                len(entries),
                referenced,
                len(entries) - referenced,
                dataset.num_repeats,
            )


def _buckets(batches: Batches) -> list[tuple[object, ...]]:
    """One row for all groups of the same sizes, the largest first."""
    counts: Counter[tuple[str, str, int]] = Counter()
    sums: Counter[tuple[str, str, int]] = Counter()
    for group in batches.groups:
        target, *references = (f"{width}x{height}" for width, height in group.entries[0].sizes)
        key = target, ", ".join(references), train_needs.tokens(group)
        counts[key] += len(group.entries) * group.repeats
        sums[key] += _batches_of(group)
    ordered = sorted(counts, key=lambda key: key[2], reverse=True)
    return [(key[0], key[1], counts[key], sums[key]) for key in ordered]


def _batches_of(group: Group) -> int:
    return -(-len(group.entries) * group.repeats // group.batch_size)


def _lengths(options: Train, run: Run, outline: Outline, saves: Forecast) -> Iterable[tuple[str, str]]:
    plan, trained, work = run.plan, outline.trained, outline.needs.work
    first = run.start.progress.step
    count = sum(parameter.numel() for parameter in trained.parameters.values())
    yield "trained", f"{count:,} parameters in {trained.modules} modules"
    yield "batches an epoch", f"{plan.batches} of {run.batches.items_per_epoch} items"
    yield "steps", f"{plan.steps}" + (f", of which {first} are done" if first else "")
    yield "epochs", f"{plan.epochs}"
    yield "largest batch", f"{work.batch} x {work.tokens} tokens"
    yield "sample pictures", f"{_draws(options, plan, first)} times {len(outline.samples)}"
    yield "files", f"{saves.adapters} adapters, {saves.states} states; at most {size(saves.bytes)} at a time"
    yield "free on the disk", size(shutil.disk_usage(run.names.folder).free)


def _draws(options: Train, plan: Plan, first: int) -> int:
    rhythm = values.rhythm(options)
    times: Sequence[str | None] = [rhythm.label(step, plan) for step in range(first, plan.steps)]
    return sum(label is not None for label in times) + (rhythm.at_first and first == 0)
