"""Runs of `kontext` that end by SIGKILL, a second each: `python -m tests.training.killing`.

A process that has imported everything, and started no thread, forks children for each line on its standard input
(JSON: words of the command line, folder, how many processes, kill) and answers with a line (`Ended`). `kill` is null,
or says which process (`rank`) and when: {"after": seconds}, or {"event": n}: just before the n-th time that it or its
threads open, rename, remove or make something in `folder`.
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
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.launch import free_port

KILLED = -int(signal.SIGKILL)
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
EVENT, CONNECTED = b".", b"c"  # what a child tells of itself
PATIENCE = 60.0  # seconds in which the others must have ended by themselves when one was killed
Kill = Mapping[str, float | int]


@dataclass(frozen=True)
class Ended:
    """How a run ended: exit codes (KILLED if by SIGKILL), how long it took, what each process did in its folder.

    connected: whether the processes had found each other. One that waits for another who never comes is ended as the
    launcher above it would. alone: seconds from the end of the first process to that of the last.
    """

    codes: list[int]
    seconds: float
    events: list[int]
    connected: bool = True
    alone: float = 0.0

    @property
    def killed(self) -> bool:
        return KILLED in self.codes

    @property
    def hung(self) -> bool:
        return self.connected and self.alone >= PATIENCE


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

    def run(
        self,
        words: Sequence[str],
        folder: Path,
        kill: Kill | None = None,
        *,
        processes: int = 1,
        place: Mapping[str, str] | None = None,
    ) -> Ended:
        """One run, to its end or until one of its processes is killed. place: environment variables."""
        assert self.process.stdin and self.process.stdout
        request = {"words": list(words), "folder": str(folder), "processes": processes, "kill": kill}
        request["place"] = dict(place or {})
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, self.log.read_text()
        return Ended(**json.loads(answer))


def draw(source: random.Random, whole: Ended) -> Kill:
    """A moment in a run that is as long as `whole`: by the clock or, to hit what is being saved, by the event."""
    rank = source.randrange(len(whole.codes))
    if source.random() < 0.5 or not whole.events[rank]:
        return {"rank": rank, "after": source.uniform(0, whole.seconds)}
    return {"rank": rank, "event": source.randint(1, whole.events[rank])}


@dataclass
class Child:
    """A process of a run, and the pipe in which it tells of itself, which survives it."""

    pid: int
    handle: int
    pipe: int
    told: bytes = b""
    code: int | None = None

    def bury(self) -> None:
        """Once it has ended: its exit code, and what it told."""
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        with suppress(BlockingIOError):  # its workers may live, and keep the pipe open
            self.told = os.read(self.pipe, 1 << 16)
        os.close(self.handle)
        os.close(self.pipe)


def _watch(folder: str, told: int, kill_at: int | None) -> None:
    """Tells what happens in the folder."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in EVENTS or not any(str(part).startswith(folder) for part in arguments[:2]):
            return
        seen += 1
        if seen == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(told, EVENT)

    sys.addaudithook(hook)


def _tell_when_connected(told: int) -> None:
    import torch.distributed as dist

    connect = dist.init_process_group

    def connected(*given: Any, **named: Any) -> None:
        connect(*given, **named)
        os.write(told, CONNECTED)

    dist.init_process_group = connected


def _child(request: dict[str, Any], place: Mapping[str, str], told: int, kill_at: int | None) -> None:
    from kontext.cli import main

    os.environ.update(place)
    os.dup2(2, 1)
    _watch(request["folder"], told, kill_at)
    _tell_when_connected(told)
    os._exit(main(request["words"]))


def _fork(request: dict[str, Any], rank: int, port: int) -> Child:
    size, kill = request["processes"], request["kill"] or {}
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)} if size > 1 else {}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **request["place"]}
    kill_at = kill.get("event") if kill.get("rank") == rank else None
    mine, theirs = os.pipe()
    if (pid := os.fork()) == 0:
        os.close(mine)
        _child(request, place, theirs, kill_at)
    os.close(theirs)
    os.set_blocking(mine, False)
    return Child(pid, os.pidfd_open(pid), mine)


def _living(children: Sequence[Child]) -> list[Child]:
    return [child for child in children if child.code is None]


def _await_end(children: Sequence[Child], seconds: float | None) -> bool:
    """Whether one of those that live ends in so many seconds."""
    living = _living(children)
    ready = select.select([child.handle for child in living], [], [], seconds)[0]
    for child in living:
        if child.handle in ready:
            child.bury()
    return bool(ready)


def _watch_over(children: Sequence[Child], kill: Kill) -> Ended:
    """Waits for their end. The one to be killed by the clock is, and all that the others leave alone for too long."""
    begin = time.monotonic()
    if not _await_end(children, kill.get("after")):
        os.kill(children[kill["rank"]].pid, signal.SIGKILL)
        _await_end(children, None)
    first = time.monotonic()
    connected = all(CONNECTED in child.told for child in children if child.code is not None)
    last = first + (PATIENCE if connected else 0.0)
    while _living(children) and _await_end(children, max(0.0, last - time.monotonic())):
        pass
    for child in _living(children):
        os.kill(child.pid, signal.SIGKILL)
        child.bury()
    end = time.monotonic()
    events = [child.told.count(EVENT) for child in children]
    return Ended([child.code for child in children], end - begin, events, connected, end - first)


def _serve() -> None:
    import bitsandbytes  # noqa: F401  # what runs would import, once
    import prodigyopt  # noqa: F401
    import schedulefree  # noqa: F401
    import transformers.optimization  # noqa: F401

    import kontext.commands.train  # noqa: F401

    for line in sys.stdin:
        assert len(os.listdir("/proc/self/task")) == 1, "a thread would not survive the fork"
        request = json.loads(line)
        port = free_port()
        children = [_fork(request, rank, port) for rank in range(request["processes"])]
        ended = _watch_over(children, request["kill"] or {})
        print(json.dumps(asdict(ended)), flush=True)


if __name__ == "__main__":
    _serve()
