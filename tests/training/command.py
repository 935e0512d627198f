"""`kontext train` as tests call it, on the cached dataset."""

from pathlib import Path

from safetensors import safe_open

from kontext.cli import main
from tests.training.dataset import Cached

BASE = ["--seed", "42", "--network-dim", "4", "--learning-rate", "1e-3", "--max-data-loader-n-workers", "0"]


def words(cached: Cached, output: Path, settings: str, *more: str) -> list[str]:
    """The command line: settings in one string, and words that may hold spaces."""
    where = ["--output-dir", str(output), "--output-name", "edit"]
    return ["train", *cached.models, *BASE, *where, *settings.split(), *more]


def train(cached: Cached, output: Path, settings: str, *more: str) -> int:
    """Runs the command in this process; its exit code."""
    return main(words(cached, output, settings, *more))


def files(folder: Path) -> list[str]:
    """What a run has written, but for its report and history."""
    return sorted(path.name for path in folder.iterdir() if path.suffix not in (".html", ".jsonl"))


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()
