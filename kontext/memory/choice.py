"""What to keep where, so that a run fits into a given amount of memory and loses the least time.

Copies of streamed blocks run beside the computation, and cost what they take longer. Modulation is copied for many
passes together, at next to no cost.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from kontext.memory.estimate import Work
from kontext.memory.placement import Placement
from kontext.memory.policies import Mix, Policy
from kontext.memory.streaming import Swap, streamed_blocks
from kontext.memory.weights import Weights
from kontext.model.transformer import TransformerConfig

OPERATIONS_PER_BYTE = 6000  # those an RTX 4090 does (150e12 a second) while a byte comes over PCIe (25e9)
OFFLOADING = 0.02  # of the time of a step: copies of checkpoints are hidden, but do not come for nothing
POLICIES: tuple[Policy, ...] = ("none", "selective", "whole", "offloaded")


Time = tuple[float, int, int]
"""In floating-point operations; between equals the bytes of streamed blocks decide, then those of modulation."""


@dataclass(frozen=True)
class Setup:
    """Where weights live, and what blocks keep for their backward (in training), as in Mix."""

    placement: Placement
    policy: Policy = "none"
    count: int | None = None

    @property
    def mix(self) -> Mix:
        return Mix(self.policy, self.count)


@dataclass(frozen=True)
class Choice:
    """The fastest setup that fits, None if none does; the smallest memory, in bytes, with which one would."""

    setup: Setup | None
    smallest: int


def choose(
    setups: Iterable[Setup],
    *,
    peak: Callable[[Setup], int],
    time: Callable[[Setup], tuple[float, int]],
    budget: int,
) -> Choice:
    """peak: bytes on the device; time: what is to be least."""
    peaks = {setup: peak(setup) for setup in setups}
    fitting = [setup for setup, needed in peaks.items() if needed <= budget]
    return Choice(min(fitting, key=time, default=None), min(peaks.values()))


def lightened(setup: Setup, config: TransformerConfig, *, peak: Callable[[Setup], int], budget: int) -> Setup:
    """The setup with as many blocks of the next lighter policy as still fit."""
    if setup.policy not in ("selective", "whole"):
        return setup
    counts = range(1, config.double_blocks + config.single_blocks)
    mixed = (replace(setup, count=count) for count in counts)
    return next((fewer for fewer in mixed if peak(fewer) <= budget), setup)


def setups(
    config: TransformerConfig,
    *,
    swaps: Sequence[Swap] | None = None,
    modulations: Sequence[bool] = (False, True),
    policies: Sequence[Policy] = ("none",),
) -> Iterator[Setup]:
    """All that can be had. swaps, modulations, policies: those to choose from, None being every number of blocks."""
    swaps = possible_swaps(config) if swaps is None else swaps
    for swap, modulation, policy in product(swaps, modulations, policies):
        yield Setup(Placement(swap, modulation), policy)


def possible_swaps(config: TransformerConfig) -> list[Swap]:
    """0 and up, as long as some block stays; then "max"."""
    total = config.double_blocks + config.single_blocks
    swaps: list[Swap] = []
    for swap in range(total + 1):
        if sum(map(len, streamed_blocks(config.double_blocks, config.single_blocks, swap))) == total:
            break
        swaps.append(swap)
    return [*swaps, "max"]


def operations(config: TransformerConfig, work: Work) -> tuple[float, float]:
    """Of the blocks' linears and of attention in one forward pass: 24 D^2 a token and block, and 4 L^2 D a block."""
    blocks = config.double_blocks + config.single_blocks
    per_token = 2 * config.width * (4 * config.width + 2 * config.mlp_width)
    attention = 4 * work.tokens**2 * config.width
    return blocks * work.batch * work.tokens * per_token, blocks * work.batch * attention


def step_time(weights: Weights, work: Work) -> Callable[[Setup], Time]:
    """Of a training step.

    Backward costs the linears once more and attention 2.5 times. With `selective` all linears but the last of a
    block are computed again (0.6 of them), with the others attention too.
    """
    linear, attention = operations(weights.config, work)
    plain = 2 * linear + 3.5 * attention
    again: dict[Policy, float] = {"none": 0, "selective": 0.6 * linear, "whole": 0.6 * linear + attention}
    again["offloaded"] = again["whole"] + OFFLOADING * plain

    def time(setup: Setup) -> Time:
        streamed, modulation = _on_host(weights, setup.placement)
        copied = 2 * streamed * OPERATIONS_PER_BYTE  # once for each direction
        policies = setup.mix.of(weights.config.double_blocks + weights.config.single_blocks)
        repeated = sum(map(again.__getitem__, policies)) / len(policies)
        return max(plain + repeated, copied), streamed, modulation

    return time


def picture_time(weights: Weights, work: Work) -> Callable[[Setup], Time]:
    """Of a step of a picture."""
    forward = sum(operations(weights.config, work))

    def time(setup: Setup) -> Time:
        streamed, modulation = _on_host(weights, setup.placement)
        return max(forward, streamed * OPERATIONS_PER_BYTE), streamed, modulation

    return time


def _on_host(weights: Weights, placement: Placement) -> tuple[int, int]:
    """Bytes that lie on the host: of streamed blocks, and of modulation."""
    streamed = weights.placed(Placement(placement.swap)).host
    return streamed, weights.placed(placement).host - streamed
