"""Commands in two processes on the CPU, as they find themselves when torchrun or `accelerate launch` starts them."""

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# Notes in $WRITTEN which process wrote which cache file or picture; $KILLED names one that dies at its first.
DRIVER = """
import os, signal, sys
from kontext.data import cache
from kontext.generation import outputs

rank = os.environ["RANK"]

def noting(save):
    def noted(path, *rest):
        if os.environ.get("KILLED") == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        save(path, *rest)
        with open(os.environ["WRITTEN"], "a") as file:
            file.write(f"{rank} {path.name}\\n")
    return noted

cache.save_tensors = noting(cache.save_tensors)
outputs.save_picture = noting(outputs.save_picture)
from kontext.cli import main
sys.exit(main(sys.argv[1:]))
"""


@dataclass(frozen=True)
class Launch:
    """Two processes of one run, by rank."""

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
    folder.mkdir(parents=True, exist_ok=True)
    driver = folder / "driver.py"
    driver.write_text(DRIVER)
    given = {"OMP_NUM_THREADS": "1", "WRITTEN": str(folder / "written.txt"), "KILLED": str(killed)}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    return Launch(
        tuple(
            subprocess.Popen(
                [sys.executable, str(driver), *map(str, words)],
                env={**os.environ, **given, **place, "RANK": rank, "LOCAL_RANK": rank},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in "01"
        )
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def written(folder: Path) -> list[list[str]]:
    """The names of the files that each of the two wrote."""
    lines = (folder / "written.txt").read_text().splitlines()
    return [sorted(line[2:] for line in lines if line[0] == rank) for rank in "01"]
