"""What a process holds of the parameters in training. Files hold them whole, whoever trained them."""

import torch
from torch import Tensor


class Shares:
    """All of every parameter, as without FSDP; `split.Parts` are parts of them.

    Values that belong to a parameter (its average, a moment of the optimizer) are shared as it is. Methods are called
    by all processes at the same point of the run.
    """

    def shape(self, name: str, part: Tensor) -> torch.Size:
        """The whole shape of what is held as `part`."""
        return part.shape

    def whole(self, name: str, part: Tensor) -> Tensor:
        """All of it, for the process that writes."""
        return part

    def own(self, name: str, whole: Tensor) -> Tensor:
        """This process' part of it."""
        return whole
