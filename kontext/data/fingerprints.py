"""How an edited picture, caption or model is noticed.

A picture is known by the hash of its bytes; size and times only save reading it again. Models are too large for
that and are known by a dense sample of their bytes.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

WHOLE = 64 * 2**20
SAMPLES, SAMPLE_BYTES = 4096, 4096


@dataclass(frozen=True)
class Stamp:
    """The state of a source file: bytes, times of change in ns, and hash of the content."""

    size: int
    modified: int
    changed: int
    content: str


def digest(data: bytes) -> str:
    """A hash of 128 bits, in hexadecimal."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def make_stamp(state: os.stat_result, data: bytes) -> Stamp:
    """The stamp of a file whose `state` was taken before `data` was read."""
    return Stamp(state.st_size, state.st_mtime_ns, state.st_ctime_ns, digest(data))


def is_unchanged(path: Path, stamp: Stamp) -> bool:
    """Whether the file still has the content that was stamped.

    When size and both times are as they were, nothing has written to it: the system sets the time of the last
    change (ctime) itself, so that a copied modification time hides no edit. Otherwise the content decides: a file
    that was only copied, touched or checked out anew is unchanged.
    """
    state = path.stat()
    if state.st_size != stamp.size:
        return False
    if (state.st_mtime_ns, state.st_ctime_ns) == (stamp.modified, stamp.changed):
        return True
    return digest(path.read_bytes()) == stamp.content


def weights_fingerprint(files: Iterable[Path], settings: str) -> str:
    """A hash of an encoder: its files (weights, tokenizer) and the settings that it is used with.

    Files of up to 64 MiB count whole. Of larger ones, the first 64 KiB (the header) and 4096 blocks at equal
    distances count: other weights differ everywhere, and reading 10 GB of T5 to learn that nothing is to be done
    would take longer than most of what there is to do.
    """
    total = hashlib.blake2b(settings.encode(), digest_size=16)
    for path in files:
        total.update(_sample(path))
    return total.hexdigest()


def _sample(path: Path) -> bytes:
    size = path.stat().st_size
    part = hashlib.blake2b(str(size).encode(), digest_size=16)
    with open(path, "rb") as file:
        if size <= WHOLE:
            part.update(file.read())
        else:
            part.update(file.read(2**16))
            for index in range(SAMPLES):
                file.seek((size - SAMPLE_BYTES) * index // (SAMPLES - 1))
                part.update(file.read(SAMPLE_BYTES))
    return part.digest()
