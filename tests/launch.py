"""Commands in two processes on the CPU, as they find themselves when torchrun or `accelerate launch` starts them."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Notes in $WRITTEN which process wrote which cache file or picture, in $LOADED which items it trained on, and in
# $ENCODED which prompts it encoded; $KILLED names one that dies at its first file.
DRIVER = """
import os, signal, sys
from kontext.data import batches, cache
from kontext.generation import outputs, pipeline

rank = os.environ["RANK"]

def noting(save):
    def noted(path, *rest):
        if os.environ.get("KILLED") == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        save(path, *rest)
        note("written", path.name)
    return noted

def note(what, name):
    with open(os.environ[what.upper()], "a") as file:
        file.write(f"{rank} {name}\\n")

def loading(entries, captions):
    for entry in entries:
        note("loaded", entry.item.key)
    return load_batch(entries, captions)

def encoding(model, tokenizer, prompts, **settings):
    for prompt in prompts:
        note("encoded", prompt)
    return encode_t5(model, tokenizer, prompts, **settings)

load_batch, batches.load_batch = batches.load_batch, loading
encode_t5, pipeline.encode_t5 = pipeline.encode_t5, encoding

cache.save_tensors = noting(cache.save_tensors)
outputs.save_picture = noting(outputs.save_picture)
from kontext.cli import main
sys.exit(main(sys.argv[1:]))
"""


@dataclass(frozen=True)
class Launch:
    """The processes of one run by rank, or a launcher above them."""

    processes: tuple[subprocess.Popen[str], ...]

    def ended(self, seconds: float = 120) -> list[tuple[int, str]]:
        """Exit code and everything that was printed, of each. Raises TimeoutExpired when one hangs."""
        try:
            outputs = [process.communicate(timeout=seconds)[0] for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [(p.returncode, output) for p, output in zip(self.processes, outputs, strict=True)]


def launch(folder: Path, *words: object, killed: int | None = None) -> Launch:
    """Starts `kontext` with `words` in two processes; who wrote what is noted in `folder`.

    There is no launcher above them that would kill one when the other has ended.
    """
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    place["KILLED"] = str(killed)
    return Launch(
        tuple(_start(folder, [], words, {**place, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01")
    )


def accelerate_launch(folder: Path, *words: object) -> Launch:
    """The same through `accelerate launch`."""
    settings = "--multi_gpu --num_processes 2 --num_machines 1 --dynamo_backend no --mixed_precision no"
    launcher = [
        "-m",
        "accelerate.commands.launch",
        *settings.split(),
        "--main_process_port",
        str(free_port()),
    ]
    return Launch((_start(folder, launcher, words, {}),))


def _start(
    folder: Path, launcher: Sequence[str], words: Sequence[object], place: Mapping[str, str]
) -> subprocess.Popen[str]:
    folder.mkdir(parents=True, exist_ok=True)
    driver = folder / "driver.py"
    driver.write_text(DRIVER)
    notes = {what.upper(): str(folder / f"{what}.txt") for what in ("written", "loaded", "encoded")}
    return subprocess.Popen(
        [sys.executable, *launcher, str(driver), *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **notes, **place},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def written(folder: Path) -> list[list[str]]:
    """The names of the files that each of the two wrote."""
    return [sorted(names) for names in _noted(folder / "written.txt")]


def loaded(folder: Path) -> list[list[str]]:
    """The items that each of the two was trained on, in turn."""
    return _noted(folder / "loaded.txt")


def encoded(folder: Path) -> list[list[str]]:
    """The prompts that each of the two encoded, in turn."""
    return _noted(folder / "encoded.txt")


def _noted(path: Path) -> list[list[str]]:
    lines = path.read_text().splitlines()
    return [[line[2:] for line in lines if line[0] == rank] for rank in "01"]
