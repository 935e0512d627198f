"""How the process gets memory from the system."""

import ctypes
import os

# Parameters of glibc's mallopt, from <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
LARGEST_REUSED = 33_000_000  # glibc takes up to 32 MiB
NEVER = -1


def reuse_freed_memory() -> None:
    """Let glibc keep blocks of up to 32 MiB that were freed, for the next of their kind.

    By default it hands them back, and every activation of a training step on a CPU is mapped and zeroed by the
    system anew: up to half of the time. A person's own MALLOC_ variables win; other C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt(M_MMAP_THRESHOLD, LARGEST_REUSED)
    mallopt(M_TRIM_THRESHOLD, NEVER)
    mallopt(M_ARENA_MAX, 1)
