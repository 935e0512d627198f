"""Where the transformer's weights live, as the options say."""

import torch

from kontext.memory.placement import Placement
from kontext.options.shared import Swapping


def placement(options: Swapping, device: torch.device, *, spared: bool = True) -> Placement:
    """The options' placement on `device`. spared: whether "auto" takes modulation off it.

    On a CPU there is no other memory that modulation could be taken to.
    """
    swap = options.blocks_to_swap
    return Placement(
        swap="max" if swap == "max" else int(swap),
        modulation=spared and options.modulation == "auto" and device.type == "cuda",
    )
