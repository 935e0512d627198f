"""`kontext train`: from cached batches to a LoRA file."""

import json
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from secrets import randbits
from typing import Any

from kontext import console
from kontext.checkpoints import empty_transformer
from kontext.commands import (
    budget,
    train_average,
    train_course,
    train_data,
    train_early,
    train_export,
    train_hub,
    train_logs,
    train_model,
    train_needs,
    train_network,
    train_whole,
)
from kontext.commands import train_values as values
from kontext.commands.models import model_files
from kontext.commands.train_dry import Run, dry_run
from kontext.commands.train_report import journal
from kontext.commands.train_show import show_timesteps
from kontext.data.batches import Batches
from kontext.errors import UserError
from kontext.generation.pipeline import Kontext
from kontext.options.train import Train
from kontext.training.advice import Settings, advice
from kontext.training.feed import Examples
from kontext.training.loop import Updates
from kontext.training.names import Names
from kontext.training.objective import Objective
from kontext.training.optimizers import evaluation_weights
from kontext.training.plan import Plan
from kontext.training.previews import Previews, Rhythm, Sample, prepare
from kontext.training.prompts import read_sample_prompts
from kontext.training.session import Session, Start
from kontext.training.state import Progress, changed_settings, latest_state, read_progress
from kontext.training.team import Team
from kontext.training.trained import Adapters, Trained


def run(options: Train) -> None:
    """Train a LoRA as the options say, or go on with one."""
    train_whole.check(options)
    names = train_whole.names(options)
    network = train_network.network(options)
    train_early.check_writable(options.output_dir, "--output-dir")
    train_early.check_places(names)
    start = _start(train_hub.fetched_state(options), names)
    team = values.team(options)
    seed = team.gather(_seed(options.seed, start))[0]
    batches = train_data.batches(options, seed)
    train_early.check(options, network, batches, team.device)
    if options.show_timesteps:
        return show_timesteps(options, batches, names)
    held = train_data.held(options, names)
    plan = values.plan(options, len(batches.sizes(0)), team.size)
    values.rate(
        options, plan, options.learning_rate
    )  # it fails now, if it does, and not with all models loaded
    settings = train_course.course(options, batches, plan, seed)
    _check_together(team, {"steps done": start.progress.step, **settings})
    _check_same(start, settings, plan)
    run = Run(names, network, start, batches, held, plan, team, seed)
    transformer = empty_transformer(options.dit)
    trained = train_model.outline(options, transformer, network, team)  # it too fails now, if it does
    if options.dry_run or options.vram_budget or options.checkpointing == "auto":
        outline = train_needs.outline(options, transformer, trained, batches, team, seed)
        options = budget.for_training(options, outline.needs, team.device)
        if options.dry_run:
            return dry_run(options, run, outline)
    _train(options, run, settings)


def _train(options: Train, run: Run, settings: dict[str, Any]) -> None:
    """Put the run together, and let it run."""
    start, batches, plan, seed = run.start, run.batches, run.plan, run.seed
    kontext = Kontext(
        model_files(options), values.runtime(options, run.team), train_network.base_loras(options)
    )
    samples = _samples(options, kontext, run.team, seed)
    transformer, trained, team = train_model.model(options, kontext, run.network, run.team, seed)
    updates = values.updates(options, run.network, trained.parameters, plan, team.device)
    modules = trained.adapters if isinstance(trained, Adapters) else {}
    updates = replace(updates, limit=train_network.limit(options, modules))
    average = train_average.average(options, updates)
    start.load(updates, team, average)
    _introduce(plan, batches, trained, updates)

    weights = partial(evaluation_weights, updates.optimizer, list(updates.parameters.values()))
    export = train_export.export(
        options, trained, batches, plan, seed=seed, optimizer=updates.optimizer, weights=weights
    )
    log = train_logs.log(options, team)
    kept = journal(options, run.names, plan, start, seed=seed, team=team)
    drawn = Previews(
        kontext,
        samples,
        plan=plan,
        rhythm=values.rhythm(options),
        team=team,
        weights=weights,
        names=run.names,
        drawn=train_logs.pictures(team, kept.samples),
    )
    session = Session(
        team=team,
        examples=Examples(batches, plan, seed=seed, buckets=options.num_timestep_buckets),
        workers=options.max_data_loader_n_workers,
        persistent=options.persistent_data_loader_workers,
        objective=Objective(transformer, values.timesteps(options), options.guidance_scale, team.run),
        updates=updates,
        start=start,
        names=run.names,
        rules=values.rules(options),
        settings=settings,
        average=average,
        adapter=train_average.both(export, average),
        weights=weights,
        previews=drawn if samples else None,
        held=run.held,
        log=log,
        journal=kept,
    )
    with train_hub.uploads(options, team) as uploads:
        replace(session, written=train_hub.written(options, run.names, uploads)).run()


def _start(resume: Path | None, names: Names) -> Start:
    """Where to begin: at a state folder if one is given or, with auto, found."""
    folder = latest_state(names.states()) if resume == Path("auto") else resume
    if folder is None:
        if resume is not None:
            console.notice(f"--resume auto: {names.folder} has no state of {names.stem} yet; starting anew.")
        return Start(None, Progress(step=0, settings={}))
    progress = read_progress(folder)
    console.say(f"Going on from {folder}, after step {progress.step}.")
    return Start(folder, progress)


def _seed(given: int | None, start: Start) -> int:
    """The seed that was given, else that of the run that goes on, else a new one."""
    if given is not None:
        return given
    seed = start.progress.settings.get("seed", randbits(32))
    console.notice(f"--seed {seed}")
    return seed


def _check_same(start: Start, settings: dict[str, object], plan: Plan) -> None:
    """Compares with the run that goes on: warns of what changes its course.

    Raises UserError if its network, optimizer or batches are others: its state would mean nothing.
    """
    if start.folder is None:
        return
    if start.progress.step > plan.steps:
        raise UserError(
            f"--resume {start.folder}: {start.progress.step} steps are done already, and the run is to have "
            f"{plan.steps}. Raise --max-train-steps or --max-train-epochs."
        )
    if start.progress.step == plan.steps:
        console.notice(
            "All steps of this run are done: to train longer, raise --max-train-steps or --max-train-epochs."
        )
    changed = changed_settings(start.progress.settings, settings)
    told = {name: f"{name} was {before}, now {now}" for name, (before, now) in changed.items()}
    if fixed := [words for name, words in told.items() if name in train_course.FIXED]:
        raise UserError(
            f"--resume {start.folder}: {', '.join(fixed)}. Give the same values, or begin a new run from the "
            "adapter with --network-weights."
        )
    if told:
        console.warn(
            f"{', '.join(told.values())}: the run goes on, but not as it would have without the change."
        )


def _check_together(team: Team, found: dict[str, Any]) -> None:
    """Raises UserError in all processes when one is about to do something else than the first.

    found: what decides how training goes, by the user's names for it.
    """
    first, *others = team.gather(json.loads(json.dumps(found)))  # as `changed_settings` compares
    for rank, other in enumerate(others, 1):
        if changed := changed_settings(first, other):
            told = ", ".join(
                f"{name} is {here} there, {one} in the first" for name, (one, here) in changed.items()
            )
            raise UserError(
                f"Process {rank} would train otherwise than the first: {told}. Give the same command on all machines, "
                "with dataset, caches and --output-dir on a disk that all of them see."
            )


def _samples(options: Train, kontext: Kontext, team: Team, seed: int) -> list[Sample]:
    """The sample pictures, prepared before the transformer takes its memory: those that this process draws.

    Processes that are going to share one model draw each of them together.
    """
    if options.sample_prompts is None:
        return []
    if values.rhythm(options) == Rhythm():
        console.notice(
            "--sample-prompts: no sample is drawn without --sample-every-n-steps, --sample-every-n-epochs or "
            "--sample-at-first."
        )
        return []
    requests = read_sample_prompts(options.sample_prompts, values.sample_request(seed))
    console.say(f"Encoding {len(requests)} sample prompts")
    count = len(requests)
    mine = range(count) if train_whole.is_split(options, team) else team.deal(count)
    with console.overheard() as remarks:
        samples = prepare(kontext, requests, mine)
    told, *others = team.gather(remarks)
    for remark in dict.fromkeys(chain(*others)):
        if team.leads and remark not in told:
            console.remark(remark)
    return samples


def _introduce(plan: Plan, batches: Batches, trained: Trained, updates: Updates) -> None:
    """Says what is going to be trained, and what of it is known to be useless."""
    console.say(
        f"Training {trained.count:,} parameters in {trained.modules} modules: {batches.items_per_epoch} items in {plan.batches} "
        f"batches an epoch, {plan.steps} steps over {plan.epochs} epochs."
    )
    modules = trained.adapters if isinstance(trained, Adapters) else {}
    kind, groups = type(updates.optimizer).__name__, updates.optimizer.param_groups
    relative = any(group.get("relative_step") for group in groups)
    for sentence in advice(Settings(kind, updates.rates, modules, relative)):
        console.notice(sentence)
