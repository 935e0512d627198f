"""Weights on their way into the system's page cache before they are asked for.

Loading is as fast as the disk only when the disk never waits for the program: not while torch is imported, and not
while a tensor is cast or copied to the GPU.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

CHUNK = 8 * 2**20
READERS = 4  # what fast disks need to be busy
SHARE = 0.5  # of the free memory: what is read ahead must still be there when its turn comes
PAGE = 4096

Piece = tuple[Path, int]
"""A file and the offset of a chunk in it."""


def read_ahead(paths: Iterable[Path]) -> list[Thread]:
    """Begin to read files, or the .safetensors files in folders, in this order; returns the threads that do.

    What cannot be read is left to the loading to complain about.
    """
    if not hasattr(os, "preadv"):  # Windows reads ahead by itself
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
    buffer = bytearray(CHUNK)
    while True:
        try:
            file, start = pieces.get_nowait()
            _read_piece(file, start, buffer)
        except (Empty, OSError):
            return


def _read_piece(file: Path, start: int, buffer: bytearray) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        if not _is_cached(descriptor, start):
            os.preadv(descriptor, [buffer], start)
    finally:
        os.close(descriptor)


def _is_cached(descriptor: int, start: int) -> bool:
    """Whether first and last page of a chunk are in memory already. Linux tells; elsewhere it never is."""
    flag = getattr(os, "RWF_NOWAIT", None)
    end = min(start + CHUNK, os.fstat(descriptor).st_size) - PAGE
    try:
        return flag is not None and all(
            os.preadv(descriptor, [bytearray(1)], place, flag) for place in (start, max(start, end))
        )
    except OSError:  # it would have to wait, or this file system does not tell
        return False


def _free_memory() -> int:
    """Bytes that programs can have without others being swapped out: the page cache counts."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kilobytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        return int(kilobytes) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
