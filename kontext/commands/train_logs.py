"""Where `kontext train` logs to: TensorBoard and Weights & Biases, through accelerate's trackers."""

import os
import sys
import tomllib
from collections.abc import Sequence
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker
from PIL import Image

from kontext.errors import UserError
from kontext.options.base import secret_values, without_secrets
from kontext.options.train import Train
from kontext.training.monitor import Log
from kontext.training.previews import Drawn
from kontext.training.team import Team

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
HIDDEN = "***"


def trackers(options: Train) -> list[str]:
    """The loggers that are asked for. Raises UserError when the package of one is missing."""
    asked = options.log_with or ("tensorboard" if options.logging_dir else None)
    found = list(PACKAGES) if asked == "all" else [asked] if asked else []
    for name in found:
        if not any(find_spec(package) for package in PACKAGES[name]):
            raise UserError(f"--log-with {asked} needs the package {name}: pip install {name}")
    return found


def folder(options: Train) -> Path | None:
    """The folder of this run's logs; made only if something is written there."""
    if options.logging_dir is None:
        return None
    return options.logging_dir / f"{options.log_prefix}{datetime.now():%Y%m%d%H%M%S}"


def log(options: Train, team: Team) -> Log | None:
    """Where values are logged to: nowhere unless logs are asked for.

    Raises UserError for a bad --log-tracker-config.
    """
    found = trackers(options)
    if not found:
        return None
    hide(sys.argv, secret_values(options))
    if "wandb" in found and options.wandb_api_key is not None:
        os.environ["WANDB_API_KEY"] = (
            options.wandb_api_key.get_secret_value()
        )  # wandb.login would write it down
    config = {name: str(value) for name, value in without_secrets(options).items()}
    try:
        team.accelerator.init_trackers(
            options.log_tracker_name,
            config=config if options.log_config else None,
            init_kwargs=arguments(options, found),
        )
    except TypeError as error:
        if options.log_tracker_config is None:
            raise
        raise UserError(f"--log-tracker-config {options.log_tracker_config}: {error}.") from error
    return lambda values, step: team.track(lambda tracker: tracker.log(dict(values), step=step))


def pictures(team: Team, also: Drawn) -> Drawn:
    """What is called with sample pictures: they are logged too, each under the number of its prompt."""

    def drawn(done: int, label: str, paths: Sequence[Path]) -> None:
        also(done, label, paths)
        team.track(lambda tracker: _log_pictures(tracker, done, paths))

    return drawn


def _log_pictures(tracker: GeneralTracker, done: int, paths: Sequence[Path]) -> None:
    for number, path in enumerate(paths):
        picture = Image.open(path).convert("RGB")
        if tracker.name == "wandb":
            tracker.log_images({f"sample_{number}": [picture]}, step=done)
        elif tracker.name == "tensorboard":
            pixels = np.asarray(picture)[None]
            tracker.log_images({f"sample_{number}": pixels}, step=done, dataformats="NHWC")


def hide(words: list[str], secrets: Sequence[str]) -> None:
    """Blots secrets out of the command line as this process knows it: wandb logs it."""
    for secret in filter(None, secrets):
        words[:] = [word.replace(secret, HIDDEN) for word in words]


def arguments(options: Train, found: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What each logger is started with: what the file says, then the options."""
    given: dict[str, dict[str, Any]] = {name: {} for name in found}
    if options.log_tracker_config is not None:
        given |= _read(options.log_tracker_config)
    if "wandb" in found:
        if options.logging_dir is not None:
            options.logging_dir.mkdir(parents=True, exist_ok=True)
            given["wandb"].setdefault("dir", str(options.logging_dir))
        if options.wandb_run_name is not None:
            given["wandb"]["name"] = options.wandb_run_name
    return given


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"--log-tracker-config {path}: {error}.") from error
    wrong = [name for name, table in tables.items() if name not in PACKAGES or not isinstance(table, dict)]
    if wrong:
        raise UserError(
            f"--log-tracker-config {path}: {wrong[0]!r} is no table of a logger. Known are [tensorboard] and [wandb]."
        )
    return tables
