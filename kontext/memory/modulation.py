"""Modulation weights on the host.

More than a quarter of FLUX's parameters (6.45 GB in bfloat16) only map one vector per step to shifts,
scales and gates of the blocks. They need no place on the device: the modulation of many steps is computed together,
all of a picture's by `Denoiser.prepare`, a window of training's by `training.ahead`, and each weight visits the device
once for them.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kontext.memory.pinned import pinned
from kontext.model.blocks import Modulation, modulations
from kontext.model.transformer import Transformer

EMBEDDERS = ("time_in", "guidance_in", "vector_in")


class HostModulation(nn.Module):
    """A Modulation whose frozen weights stay in (pinned) host memory and are copied over for each call."""

    def __init__(self, base: Modulation) -> None:
        super().__init__()
        self.lin = base.lin
        self.memory = [self._moved(parameter) for parameter in self.lin.parameters()]

    @staticmethod
    def _moved(parameter: nn.Parameter) -> Tensor:
        """Puts the parameter into host memory, which is to be held: see `pinned`."""
        memory = pinned(parameter.numel() * parameter.element_size())
        host = memory.view(parameter.dtype).view(parameter.shape)
        parameter.data = host.copy_(parameter.detach())
        return memory

    def forward(self, vecs: Sequence[Tensor]) -> list[Tensor]:
        """Each (B, D) to (B, 1, parts*D)."""
        device = vecs[0].device
        weight, bias = (p.to(device, non_blocking=True) for p in (self.lin.weight, self.lin.bias))
        return modulations(partial(F.linear, weight=weight, bias=bias), vecs)


def offload_modulation(model: Transformer, device: torch.device) -> int:
    """Move the modulation weights of all blocks to the host; returns how many bytes the device is spared.

    None move when something that modulation follows from is trained: it must then be computed at every step. One with
    an adapter that is not trained goes to `device`.
    """
    places = [
        (block, name, module)
        for block in model.modules()
        for name, module in block.named_children()
        if isinstance(module, Modulation)
    ]
    trained = trains_modulation(model)
    spared = 0
    for block, name, module in places:
        if trained or type(module.lin) is not nn.Linear:
            module.to(device)
            continue
        setattr(block, name, HostModulation(module))
        spared += sum(p.numel() * p.element_size() for p in module.parameters())
    return spared


def trains_modulation(model: Transformer) -> bool:
    """Whether training changes what modulation follows from: its weights, or those of the conditioning vector."""
    embedders = (module for name, module in model.named_children() if name in EMBEDDERS)
    parts = (*embedders, *(module for module in model.modules() if isinstance(module, Modulation)))
    return any(parameter.requires_grad for part in parts for parameter in part.parameters())


def has_host_modulation(model: nn.Module) -> bool:
    """Whether modulation had better be computed for many steps together."""
    return any(isinstance(module, HostModulation) for module in model.modules())
