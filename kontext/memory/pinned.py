"""Page-locked host memory, from which a GPU copies while it computes."""

import weakref

import torch
from torch import Tensor


def pinned(nbytes: int) -> Tensor:
    """Host memory of exactly `nbytes`, page-locked where there is CUDA.

    Registered by hand: torch's own pinned allocator rounds up to powers of two, nearly doubling large slabs.
    """
    memory = torch.empty(nbytes, dtype=torch.uint8)
    if torch.cuda.is_available() and nbytes:
        cudart, address = torch.cuda.cudart(), memory.data_ptr()
        torch.cuda.check_error(cudart.cudaHostRegister(address, nbytes, 0))
        weakref.finalize(memory, cudart.cudaHostUnregister, address)
    return memory
