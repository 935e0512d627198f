"""Runs of `kontext` that end by SIGKILL, a second each: `python -m tests.training.killing`.

A process that has imported everything, and started no thread, forks a child for each line on its standard input
(JSON: words of the command line, folder, kill) and answers with a line (code, seconds, events). `kill` is null, or
{"after": seconds}, or {"event": n}: just before the n-th time that the child or its threads open, rename, remove or
make something in `folder`.
"""

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

KILLED = -int(signal.SIGKILL)
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
Kill = Mapping[str, float | int]


@dataclass(frozen=True)
class Ended:
    """How a run ended: exit code (KILLED if by SIGKILL), how long it took, what it did in its folder until then."""

    code: int
    seconds: float
    events: int


class Killer:
    """The process that forks runs; `log` gets their messages."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.killing"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )

    def __enter__(self) -> "Killer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.communicate()

    def run(self, words: Sequence[str], folder: Path, kill: Kill | None = None) -> Ended:
        """One run, to its end or until it is killed."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(
            json.dumps({"words": list(words), "folder": str(folder), "kill": kill}) + "\n"
        )
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, self.log.read_text()
        return Ended(**json.loads(answer))


def draw(source: random.Random, whole: Ended) -> Kill:
    """A moment in a run that is as long as `whole`: by the clock or, to hit what is being saved, by the event."""
    if source.random() < 0.5:
        return {"after": source.uniform(0, whole.seconds)}
    return {"event": source.randint(1, whole.events)}


def _watch(folder: str, counter: int, kill_at: int | None) -> None:
    """Counts what happens in the folder, in a pipe that survives this process."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in EVENTS or not any(str(part).startswith(folder) for part in arguments[:2]):
            return
        seen += 1
        if seen == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(counter, b".")

    sys.addaudithook(hook)


def _child(request: dict[str, Any], counter: int) -> None:
    from kontext.cli import main

    os.dup2(2, 1)
    _watch(request["folder"], counter, (request["kill"] or {}).get("event"))
    os._exit(main(request["words"]))


def _wait(pid: int, after: float | None) -> int:
    """The exit code of the child, which is killed when it lives longer than `after` seconds."""
    handle = os.pidfd_open(pid)
    if after is not None and not select.select([handle], [], [], after)[0]:
        os.kill(pid, signal.SIGKILL)
    os.close(handle)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _serve() -> None:
    import bitsandbytes  # noqa: F401  # what runs would import, once
    import prodigyopt  # noqa: F401
    import schedulefree  # noqa: F401
    import transformers.optimization  # noqa: F401

    import kontext.commands.train  # noqa: F401

    for line in sys.stdin:
        assert len(os.listdir("/proc/self/task")) == 1, "a thread would not survive the fork"
        request = json.loads(line)
        mine, theirs = os.pipe()
        begin = time.monotonic()
        if (pid := os.fork()) == 0:
            _child(request, theirs)
        code = _wait(pid, (request["kill"] or {}).get("after"))
        seconds = time.monotonic() - begin
        os.set_blocking(mine, False)
        try:
            events = len(os.read(mine, 1 << 16))
        except BlockingIOError:
            events = 0
        os.close(mine)
        os.close(theirs)
        print(json.dumps({"code": code, "seconds": seconds, "events": events}), flush=True)


if __name__ == "__main__":
    _serve()
