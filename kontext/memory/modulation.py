"""Modulation weights on the host.

More than a quarter of FLUX's parameters (6.45 GB in bfloat16) only map one vector per step to shifts,
scales and gates of the blocks. They need no place on the device: `Denoiser.prepare` computes all steps ahead, and
each weight visits the device once.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kontext.memory.pinned import pinned
from kontext.model.transformer import Modulation, Transformer, by_level


class HostModulation(nn.Module):
    """A Modulation whose frozen weights stay in (pinned) host memory and are copied over for each call."""

    def __init__(self, base: Modulation) -> None:
        super().__init__()
        self.lin = base.lin
        for parameter in self.lin.parameters():
            host = (
                pinned(parameter.numel() * parameter.element_size())
                .view(parameter.dtype)
                .view(parameter.shape)
            )
            parameter.data = host.copy_(parameter.detach())

    def forward(self, vec: Tensor) -> Tensor:
        """vec (..., B, D) to (..., B, 1, parts*D)."""
        weight, bias = (p.to(vec.device, non_blocking=True) for p in (self.lin.weight, self.lin.bias))
        return by_level(partial(F.linear, weight=weight, bias=bias), F.silu(vec))


def offload_modulation(model: Transformer, device: torch.device) -> int:
    """Move the modulation weights of all blocks to the host; returns how many bytes the device is spared.

    A modulation with an adapter is needed at every step: it goes to `device`.
    """
    spared = 0
    for block in model.blocks():
        modulations = [
            (name, module) for name, module in block.named_children() if isinstance(module, Modulation)
        ]
        for name, module in modulations:
            if type(module.lin) is not nn.Linear:
                module.to(device)
                continue
            setattr(block, name, HostModulation(module))
            spared += sum(p.numel() * p.element_size() for p in module.parameters())
    return spared
