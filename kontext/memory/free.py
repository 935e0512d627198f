"""How much more memory a GPU can give."""

import torch


def free_bytes(device: torch.device) -> int:
    """What is free on a GPU: to all programs and within this one's share, and what torch holds without using it."""
    free, total = torch.cuda.mem_get_info(device)
    reserved, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    share = int(total * torch.cuda.get_per_process_memory_fraction(device)) - reserved
    return min(free, share) + reserved - used
