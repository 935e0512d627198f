"""What blocks keep for the backward pass, and who computes the rest again."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from torch import nn

from kontext.model.transformer import Transformer

Policy = Literal["none", "selective", "whole", "offloaded"]
"""What a block keeps for its backward: all that this needs; its input and the attention's output; its input; nothing,
while its input waits on the host."""

LIGHTER: dict[Policy, Policy] = {
    "none": "none", "selective": "none", "whole": "selective", "offloaded": "whole",
}  # fmt: skip
"""The policy that keeps more and computes less again."""


@dataclass(frozen=True)
class Mix:
    """`policy` for the first `count` blocks (None: for all), the next lighter one for the rest."""

    policy: Policy = "none"
    count: int | None = None

    @classmethod
    def read(cls, words: str) -> "Mix":
        """Of the form "selective" or "selective:20"."""
        policy, _, count = words.partition(":")
        return cls(cast(Policy, policy), int(count) if count else None)

    def __str__(self) -> str:
        return self.policy if self.count is None else f"{self.policy}:{self.count}"

    def of(self, total: int) -> list[Policy]:
        """The policies of `total` blocks."""
        count = total if self.count is None else min(self.count, total)
        return [self.policy] * count + [LIGHTER[self.policy]] * (total - count)


Policies = Policy | Sequence[Policy]
"""One for all blocks, or one for each, double-stream blocks first."""


def places(model: Transformer, policies: Policies) -> Iterator[tuple[nn.ModuleList, int, Policy]]:
    """The list that holds each block, the block's number in it, and its policy."""
    blocks = [(held, i) for held in (model.double_blocks, model.single_blocks) for i in range(len(held))]
    each = [policies] * len(blocks) if isinstance(policies, str) else policies
    for (held, i), policy in zip(blocks, each, strict=True):
        yield held, i, policy
