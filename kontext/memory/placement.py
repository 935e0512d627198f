"""Where the weights of a transformer live: on the device, or partly on the host."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kontext.memory.modulation import HostModulation, offload_modulation
from kontext.memory.streaming import Streamed, Swap, stream_blocks, streamed_blocks
from kontext.model.transformer import Transformer, TransformerConfig

_BLOCK = re.compile(r"(double|single)_blocks\.(\d+)\.(.*)")
_MODULATION = re.compile(r"((img|txt)_mod|modulation)\.lin\..*")


@dataclass(frozen=True)
class Placement:
    """swap: blocks whose weights are streamed, see `stream_blocks`; modulation: its weights stay on the host.

    everything: the whole model is loaded on the host, for whoever takes its weights from there.
    """

    swap: Swap = 0
    modulation: bool = False
    everything: bool = False

    def on_host(self, config: TransformerConfig) -> Callable[[str], bool]:
        """Whether a tensor of this name is to stay on the host: such weights never fill the device."""
        double, single = streamed_blocks(config.double_blocks, config.single_blocks, self.swap)
        streamed = {"double": set(double), "single": set(single)}

        def stays(name: str) -> bool:
            if self.everything:
                return True
            match = _BLOCK.fullmatch(name)
            if match is None:
                return False
            if _MODULATION.fullmatch(match[3]):
                return self.modulation
            return int(match[2]) in streamed[match[1]]

        return stays

    def apply(self, model: Transformer, device: torch.device) -> None:
        """Arrange a loaded model, unless it is already. Adapters are attached before, recomputation follows."""
        if any(isinstance(module, Streamed | HostModulation) for module in model.modules()):
            return
        if self.modulation:
            offload_modulation(model, device)
        if self.swap:
            stream_blocks(model, self.swap, device)
