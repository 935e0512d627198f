"""What stands in a block's place."""

from collections.abc import Sequence

from torch import Tensor, nn


class Wrapped(nn.Module):
    """A transformer block, or what wraps one already, that runs in another way; its modulation does not."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def modulation(self, vecs: Sequence[Tensor]) -> list[Tensor]:
        return self.block.modulation(vecs)
