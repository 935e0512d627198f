"""The transformer of a run, and what of it is trained."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from kontext import console
from kontext.commands import train_network, train_values, train_whole
from kontext.device import precision_of, resolve_dtype
from kontext.generation.parts import Runtime
from kontext.generation.pipeline import Kontext
from kontext.lora.files import AdapterFile, load_weights
from kontext.lora.linear import AdapterLinear
from kontext.lora.report import read_adapters
from kontext.memory.casting import compute_in
from kontext.memory.recompute import recompute_blocks
from kontext.memory.remaking import remake_blocks
from kontext.model.transformer import Transformer
from kontext.options.train import Train
from kontext.training.network import Network, build
from kontext.training.seeds import seed_of
from kontext.training.split import split
from kontext.training.team import Team
from kontext.training.trained import Adapters, Trained, Weights, thaw


def model(
    options: Train, kontext: Kontext, network: Network, team: Team, seed: int
) -> tuple[Transformer, Trained, Team]:
    """The transformer, what is trained of it, and who trains it.

    Load, attach or thaw, remake, place, recompute, split, in this order.
    """
    transformer, runtime = kontext.transformer(), kontext.runtime
    if not train_whole.is_whole(options):
        adapters = _attached(options, transformer, network, seed, runtime.device, told=False)
        _spare(options, transformer, runtime)
        return transformer, adapters, team
    parameters = thaw(transformer, network, stored=train_whole.stored(options), rest=runtime.dtype)
    together = train_whole.is_split(options, team)
    if not together:
        compute_in(transformer, parameters, runtime.dtype)
    _spare(options, transformer, runtime)
    if together:
        console.say(f"{team.size} processes share one model (FSDP).")
        team = sharing = split(team, transformer, parameters, runtime.dtype)
        parameters = sharing.shares.parameters
    return transformer, Weights(parameters, train_whole.layout(options), team), team


def outline(options: Train, transformer: Transformer, network: Network, team: Team) -> Trained:
    """What would be trained of a transformer on the meta device. Raises UserError for weights that do not fit.

    Every run begins with this, and says here what it is given; of what is merged a real one does when it merges.
    """
    if options.base_weights:
        paths = train_network.base_loras(options).paths
        read_adapters(paths, transformer.config, told=options.dry_run)
    if not train_whole.is_whole(options):
        return _attached(options, transformer, network, 0, torch.device("meta"), told=True)
    rest = precision_of(train_values.precision(options), team.device).computing
    parameters = thaw(transformer, network, stored=train_whole.stored(options), rest=rest)
    return Weights(parameters, train_whole.layout(options), team)


def _spare(options: Train, transformer: Transformer, runtime: Runtime) -> None:
    """Remake, place, recompute."""
    blocks = sum(1 for _ in transformer.blocks())
    policies = train_values.mix(options).of(blocks)
    if not runtime.compiled:  # compilers plan themselves what to make again
        remake_blocks(transformer, policies)
    runtime.placement.apply(transformer, runtime.device)
    recompute_blocks(transformer, policies)


def _attached(
    options: Train, transformer: Transformer, network: Network, seed: int, device: torch.device, *, told: bool
) -> Adapters:
    """told: whether to say what the files that are given hold."""
    given = [] if options.network_weights is None else [options.network_weights]
    files = read_adapters(given, transformer.config, told=told)
    like = files[0] if options.dim_from_weights else None
    modules = build(transformer, network, seed=seed_of("network", seed), device=device, like=like)
    for file in files:
        missing = load_weights(modules, file)
        if told:
            _tell_of(options.network_weights, file, modules, missing)
    return Adapters(modules, resolve_dtype(options.save_precision or "float32"))


def _tell_of(
    path: Path | None, file: AdapterFile, modules: Mapping[str, AdapterLinear], missing: Sequence[str]
) -> None:
    """What training begins with, of a file's modules and of those that are trained."""
    console.say(f"Starting from {path}: {len(modules) - len(missing)} modules.")
    if missing:
        console.warn(f"{path} says nothing of {len(missing)} modules, such as {missing[0]}.")
    if unused := sorted({name.removesuffix(".weight") for name in file.deltas} - modules.keys()):
        console.warn(
            f"{path}: {len(unused)} modules in it, such as {unused[0]}, are not trained here and left out. include_patterns "
            "of --network-args or --dim-from-weights keep them."
        )
