"""How much more memory a GPU can give."""

import torch


def free_bytes(device: torch.device) -> int:
    """What is free on a GPU: to all programs and within this one's share, and what torch holds without using it."""
    number = torch.cuda.current_device() if device.index is None else device.index  # a share is of a number
    free, total = torch.cuda.mem_get_info(number)
    reserved, used = torch.cuda.memory_reserved(number), torch.cuda.memory_allocated(number)
    share = int(total * torch.cuda.get_per_process_memory_fraction(number)) - reserved
    return min(free, share) + reserved - used
