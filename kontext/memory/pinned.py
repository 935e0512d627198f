"""Page-locked host memory, from which a GPU copies while it computes."""

import mmap
import weakref

import torch
from torch import Tensor

from kontext.errors import UserError

GIGABYTE = 1e9


def pinned(nbytes: int) -> Tensor:
    """Host memory of exactly `nbytes`, page-locked where there is CUDA, for as long as this tensor is referred to.

    Views of it keep the memory, but not the lock. Registered by hand: torch's own pinned allocator rounds up to powers
    of two, nearly doubling large slabs. Pages are locked whole, and none twice, so it has its own.

    Raises UserError when the system locks no more memory.
    """
    if not (torch.cuda.is_available() and nbytes):
        return torch.empty(nbytes, dtype=torch.uint8)
    locked = torch.frombuffer(_pages(nbytes), dtype=torch.uint8)
    _lock(locked, -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE)
    return locked


def _pages(nbytes: int) -> mmap.mmap:
    """Pages that a process which is started from this one does not inherit, as those that load batches are.

    Locked pages cannot be shared with it until one of the two writes: the system would copy all of them at once.
    """
    if not hasattr(mmap, "MADV_DONTFORK"):  # not on Linux
        return mmap.mmap(-1, nbytes)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_DONTFORK)
    return pages


def _lock(memory: Tensor, nbytes: int) -> None:
    """Lock the pages from where `memory` begins, until it is let go."""
    cudart, address = torch.cuda.cudart(), memory.data_ptr()
    try:
        torch.cuda.check_error(cudart.cudaHostRegister(address, nbytes, 0))
    except RuntimeError as error:
        raise UserError(
            f"The system locks no {nbytes / GIGABYTE:.2f} GB more of its memory for copies to the GPU ({error}): close "
            "other programs, or keep more weights on the GPU (--modulation resident, fewer --blocks-to-swap)."
        ) from error
    weakref.finalize(memory, cudart.cudaHostUnregister, address)
