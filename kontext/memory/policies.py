"""What blocks keep for the backward pass, and who computes the rest again."""

from collections.abc import Iterator, Sequence
from typing import Literal

from torch import nn

from kontext.model.transformer import Transformer

Policy = Literal["none", "selective", "whole", "offloaded"]
"""What a block keeps for its backward: all that this needs; its input and the attention's output; its input; nothing,
while its input waits on the host."""

Policies = Policy | Sequence[Policy]
"""One for all blocks, or one for each, double-stream blocks first."""


def places(model: Transformer, policies: Policies) -> Iterator[tuple[nn.ModuleList, int, Policy]]:
    """The list that holds each block, the block's number in it, and its policy."""
    blocks = [(held, i) for held in (model.double_blocks, model.single_blocks) for i in range(len(held))]
    each = [policies] * len(blocks) if isinstance(policies, str) else policies
    for (held, i), policy in zip(blocks, each, strict=True):
        yield held, i, policy
