"""Weights on their way into the system's page cache before they are asked for.

Loading is as fast as the disk only when the disk never waits for the program: not while torch is imported, and not
while a tensor is cast or copied to the GPU.
"""

import os
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

CHUNK = 2**20  # so small that the disk is read in order, with all readers at work
READERS = 4  # what fast disks need to be busy
SHARE = 0.5  # of the free memory: what is read ahead must still be there when its turn comes

Piece = tuple[Path, int]
"""A file and the offset of a chunk in it."""


def read_ahead(paths: Iterable[Path]) -> list[Thread]:
    """Begin to read files, or the .safetensors files in folders, in this order; returns the threads that do.

    What cannot be read is left to the loading to complain about.
    """
    if sys.platform != "linux":  # others read ahead by themselves, and have no way to read without a copy
        return []
    pieces: SimpleQueue[Piece] = SimpleQueue()
    for piece in _pieces(paths, int(SHARE * _free_memory())):
        pieces.put(piece)
    count = min(READERS, pieces.qsize())
    readers = [Thread(target=_read, args=(pieces,), name="readahead", daemon=True) for _ in range(count)]
    for reader in readers:
        reader.start()
    return readers


def _pieces(paths: Iterable[Path], room: int) -> list[Piece]:
    """The chunks of all files, up to `room` bytes."""
    files = dict.fromkeys(file for path in paths for file in _files(path))
    pieces = [(file, start) for file in files for start in range(0, file.stat().st_size, CHUNK)]
    return pieces[: room // CHUNK]


def _files(path: Path) -> list[Path]:
    """The file itself, or those of a folder; of a pipeline's folder, those of all its parts."""
    if path.is_dir():
        return sorted(path.glob("*.safetensors")) or sorted(path.glob("*/*.safetensors"))
    return [path] if path.is_file() else []


def _read(pieces: SimpleQueue[Piece]) -> None:
    """Have the system read chunks, without a copy of them: what is in memory already costs next to nothing.

    The next chunk of a file is taken where the last was opened, by which the system knows to read on after it.
    """
    opened: Path | None = None
    with ExitStack() as files:
        nowhere = files.enter_context(open(os.devnull, "wb", buffering=0)).fileno()
        while True:
            try:
                file, start = pieces.get_nowait()
                if file != opened:
                    opened, stream = file, files.enter_context(open(file, "rb", buffering=0))
                _read_piece(stream.fileno(), start, nowhere)
            except (Empty, OSError):
                return


def _read_piece(descriptor: int, start: int, nowhere: int) -> None:
    end = start + CHUNK
    while start < end and (count := os.sendfile(nowhere, descriptor, start, end - start)):
        start += count


def _free_memory() -> int:
    """Bytes that programs can have without others being swapped out: the page cache counts."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kilobytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        return int(kilobytes) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
