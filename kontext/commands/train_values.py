"""What the options of `kontext train` mean in the values that training takes."""

import os
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, patch_environment
from torch import nn
from torch.amp import GradScaler

from kontext import console
from kontext.commands import train_logs, train_whole
from kontext.commands.models import model_runtime
from kontext.device import resolve_device
from kontext.generation.parts import Runtime
from kontext.generation.request import Request
from kontext.memory.placement import Placement
from kontext.memory.policies import Mix
from kontext.options.train import Train
from kontext.timesteps import Timesteps
from kontext.training.arguments import parse_arguments
from kontext.training.loop import Updates
from kontext.training.network import Network, groups_of
from kontext.training.optimizers import make_optimizer
from kontext.training.plan import Plan
from kontext.training.previews import GUIDANCE, STEPS, Rhythm
from kontext.training.saving import Keep, SaveRules
from kontext.training.schedules import LearningRate, adjusted, followed
from kontext.training.team import Team

MIXED = {"bf16": "bfloat16", "fp16": "float16"}
MIXED_NAMES = {long: short for short, long in MIXED.items()}


def precision(options: Train) -> str:
    """The transformer's precision: --dtype if given, else that of --mixed-precision or `accelerate launch`."""
    if options.full_bf16:
        return "bfloat16"
    if "dtype" in options.model_fields_set:
        return options.dtype
    mixed = options.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return MIXED.get(mixed, options.dtype)


def team(options: Train) -> Team:
    """The processes of this run. Raises UserError for a missing GPU or logging package."""
    device = resolve_device(options.device)
    with patch_environment(ACCELERATE_USE_FSDP="false"):  # see `training.split`: accelerate is not to do it
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="no",  # precision is chosen module by module, not by autocast
            log_with=train_logs.trackers(options) or None,
            project_dir=train_logs.folder(options),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=options.ddp_timeout))],
        )
    return Team(accelerator)


def plan(options: Train, batches: int, processes: int) -> Plan:
    """Epochs of `batches` batches up to the asked number of steps or epochs."""
    one = Plan(batches, options.gradient_accumulation_steps, processes, steps=1)
    epochs = options.max_train_epochs
    steps = epochs * one.steps_per_epoch if epochs else options.max_train_steps
    return Plan(batches, options.gradient_accumulation_steps, processes, steps)


def runtime(options: Train, team: Team) -> Runtime:
    """How the models are kept. Weights of the transformer that are trained stay on the device, in float32 if
    --full-bf16 does not say otherwise; to be split among processes they are loaded on the host.
    """
    if options.gradient_checkpointing_cpu_offload and team.device.type == "cpu":
        console.notice("--gradient-checkpointing-cpu-offload: on a CPU there is nothing to offload from.")
    together = train_whole.is_split(options, team)
    found = model_runtime(options, team.device, dtype=precision(options), keep=True)
    if not train_whole.is_whole(options):
        return found
    return replace(found, placement=Placement(everything=together), weights=train_whole.stored(options))


def timesteps(options: Train) -> Timesteps:
    return Timesteps(
        sampling=options.timestep_sampling,
        sigmoid_scale=options.sigmoid_scale,
        flow_shift=options.discrete_flow_shift,
        weighting=options.weighting_scheme,
        logit_mean=options.logit_mean,
        logit_std=options.logit_std,
        mode_scale=options.mode_scale,
        minimum=options.min_timestep / 1000,
        maximum=options.max_timestep / 1000,
        preserve_shape=options.preserve_distribution_shape,
    )


def mix(options: Train) -> Mix:
    """What the blocks keep for their backward; "auto" has been settled where there is anything to choose."""
    if options.gradient_checkpointing_cpu_offload:
        return Mix("offloaded")
    if options.gradient_checkpointing:
        return Mix("whole")
    return Mix() if options.checkpointing in (None, "auto") else Mix.read(options.checkpointing)


def updates(
    options: Train,
    network: Network,
    parameters: Mapping[str, nn.Parameter],
    plan: Plan,
    device: torch.device,
) -> Updates:
    """Optimizer, learning rates, clipping and loss scale. Raises UserError for an optimizer that cannot be had."""
    groups = groups_of(
        parameters,
        rate=options.learning_rate,
        plus_ratio=network.plus_ratio,
        patterns=network.rate_patterns,
    )
    arguments = parse_arguments(options.optimizer_args, "--optimizer-args")
    scaled = precision(options) == "float16" and device.type == "cuda"
    return Updates(
        parameters=parameters,
        optimizer=make_optimizer(options.optimizer_type, groups, arguments=arguments),
        rates=[rate(options, plan, group["lr"]) for group in groups],
        max_norm=options.max_grad_norm,
        scaler=GradScaler(device.type, enabled=scaled),
    )


def rate(options: Train, plan: Plan, peak: float) -> LearningRate:
    """How a learning rate `peak` changes. Raises UserError for a scheduler that cannot be had, or has other arguments."""
    arguments = parse_arguments(options.lr_scheduler_args, "--lr-scheduler-args")
    own = LearningRate(
        peak=peak,
        schedule=options.lr_scheduler,
        total=plan.steps,
        warmup=steps(options.lr_warmup_steps, plan.steps),
        decay=steps(options.lr_decay_steps, plan.steps),
        cycles=options.lr_scheduler_num_cycles,
        power=options.lr_scheduler_power,
        min_ratio=options.lr_scheduler_min_lr_ratio,
        timescale=options.lr_scheduler_timescale,
    )
    kind = options.lr_scheduler_type
    return adjusted(own, arguments) if kind is None else followed(own, kind, arguments)


def steps(value: float, total: int) -> int:
    """A number of steps, or a share of `total` when below 1."""
    return round(value * total) if value < 1 else round(value)


def rules(options: Train) -> SaveRules:
    """When to save what."""
    adapters = Keep(options.save_last_n_epochs, options.save_last_n_steps)
    states = Keep(
        options.save_last_n_epochs_state or adapters.epochs, options.save_last_n_steps_state or adapters.steps
    )
    return SaveRules(
        every_epochs=options.save_every_n_epochs,
        every_steps=options.save_every_n_steps,
        adapters=adapters,
        states=states,
        with_state=options.save_state,
        state_at_end=options.save_state_on_train_end,
    )


def rhythm(options: Train) -> Rhythm:
    """When to sample."""
    return Rhythm(options.sample_at_first, options.sample_every_n_steps, options.sample_every_n_epochs)


def sample_request(seed: int) -> Request:
    """A sample picture where its prompt says nothing else; all with one seed, so that epochs can be compared."""
    return Request("", seed=seed, steps=STEPS, guidance=GUIDANCE)
