"""What of a run's options would fail only once its models are loaded, tried before."""

import tempfile
from pathlib import Path

import torch

from kontext import console
from kontext.commands import train_average, train_logs, train_network
from kontext.commands import train_values as values
from kontext.data.batches import Batches
from kontext.errors import UserError
from kontext.model.latents import PIXELS_PER_TOKEN
from kontext.options.train import Train
from kontext.timesteps import distribution
from kontext.training.arguments import parse_arguments
from kontext.training.footprint import optimizer_bytes
from kontext.training.names import Names
from kontext.training.network import Network
from kontext.training.optimizers import class_of

TRIED = (8, 8)  # the shape of a parameter that the optimizer takes a step with


def check(options: Train, network: Network, batches: Batches, device: torch.device) -> None:
    """Raises UserError for what the run would fail with on `device`."""
    for sentence in train_network.remarks(options, network):
        console.notice(sentence)
    _check_adapters(options)
    _check_levels(options, batches)
    arguments = parse_arguments(options.optimizer_args, "--optimizer-args")
    optimizer_bytes(options.optimizer_type, [TRIED], arguments=arguments, device=device)
    optimizer = class_of(options.optimizer_type)[0]
    train_average.check(options, optimizer)
    train_network.check_limit(options, network, optimizer)
    train_logs.arguments(options, train_logs.trackers(options))
    if options.logging_dir is not None:
        check_writable(options.logging_dir, "--logging-dir")


def check_writable(folder: Path, option: str) -> None:
    """Raises UserError now, not when the first save fails after hours."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{option} {folder}: cannot be written to ({error.strerror}).") from error


def check_places(names: Names) -> None:
    """Raises UserError where something else lies in a place of the run's files: the end of the run is too late for that,
    and a folder of weights would take the place of a folder of anything.
    """
    final, samples = names.final(), names.samples
    if samples.exists() and not samples.is_dir():
        raise UserError(f"{samples} is a file, where the folder of sample pictures goes: move it away.")
    if not final.exists() or final.is_dir() == (names.weights == "") and _holds_weights_alone(final):
        return
    what = "a folder with other things in it" if names.weights == "" and final.is_dir() else "something else"
    raise UserError(
        f"{final} is {what}, and what is trained would take its place: give another --output-name or --output-dir."
    )


def _holds_weights_alone(path: Path) -> bool:
    """Whether a folder is empty or that of a checkpoint; files are what they are."""
    inside = path.iterdir() if path.is_dir() else ()
    endings = (".safetensors", ".safetensors.index.json", "config.json")
    return all(each.is_file() and each.name.endswith(endings) for each in inside)


def _check_adapters(options: Train) -> None:
    given = [] if options.network_weights is None else [options.network_weights]
    for option, paths in (("--network-weights", given), ("--base-weights", options.base_weights)):
        for path in paths:
            if not path.exists():
                raise UserError(f"{option}: there is no file or folder {path}.")


def _check_levels(options: Train, batches: Batches) -> None:
    """A range of noise levels may hold nothing of their distribution."""
    if options.weighting_scheme in ("logit_normal", "mode") and options.timestep_sampling != "sigma":
        console.notice(
            f"--weighting-scheme {options.weighting_scheme} shapes --timestep-sampling sigma alone; it does nothing with "
            f"{options.timestep_sampling}."
        )
    settings = values.timesteps(options)
    sizes = {entry.target for group in batches.groups for entry in group.entries}
    for width, height in sizes:
        distribution(settings, (width // PIXELS_PER_TOKEN) * (height // PIXELS_PER_TOKEN))
