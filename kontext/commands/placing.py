"""Where the transformer's weights live, as the options say."""

import torch

from kontext.memory.placement import Placement
from kontext.options.shared import Swapping


def placement(options: Swapping, device: torch.device) -> Placement:
    """On a CPU there is no other memory that modulation could be spared."""
    swap = options.blocks_to_swap
    return Placement(
        swap="max" if swap == "max" else int(swap),
        modulation=options.modulation == "auto" and device.type == "cuda",
    )
