"""How the process gets memory from the system."""

import ctypes
import os
from collections.abc import Callable

# Parameters of glibc's mallopt, from <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
NEVER = -1


def reuse_freed_memory() -> None:
    """Let glibc keep what was freed, for what comes next.

    By default it hands large blocks back, and every activation of a step on a CPU is mapped and zeroed by the system
    anew: up to half of the time. A person's own MALLOC_ variables win; other C libraries are left alone.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is None or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, NEVER)
    mallopt(M_ARENA_MAX, 1)


def give_back_memory() -> None:
    """Hand freed memory back to the system: when a model has gone and others, or its files, may need the room."""
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_glibc(name: str) -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
