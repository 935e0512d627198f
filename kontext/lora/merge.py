"""Adding adapters to weights: W + sum of strength * dW, in float32."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kontext.errors import UserError
from kontext.lora.deltas import Delta
from kontext.lora.files import AdapterFile
from kontext.lora.patterns import compile_patterns, matches_any
from kontext.lora.strength import Multiplier, Strength, as_strength

Edit = Callable[[str, Tensor], Tensor]
Plan = Mapping[str, Sequence[tuple[Delta, float]]]


def merging(
    adapters: Sequence[AdapterFile],
    multipliers: Sequence[Multiplier],
    *,
    include_patterns: Sequence[str] = (),
    exclude_patterns: Sequence[str] = (),
) -> Edit:
    """An `edit(BFL tensor name, weight) -> weight` for `load_transformer`: merges `adapters` on the way in.

    What it changes comes back in float32, to be rounded once to what the model wants. See `plan_merge` for
    the arguments and errors.
    """
    plan = plan_merge(
        adapters, multipliers, include_patterns=include_patterns, exclude_patterns=exclude_patterns
    )

    def edit(name: str, weight: Tensor) -> Tensor:
        changes = plan.get(name)
        return merge_weight(weight.to(torch.float32, copy=True), changes) if changes else weight

    return edit


def plan_merge(
    adapters: Sequence[AdapterFile],
    multipliers: Sequence[Multiplier],
    *,
    include_patterns: Sequence[str] = (),
    exclude_patterns: Sequence[str] = (),
) -> Plan:
    """{BFL tensor name: (delta, strength) of every adapter}.

    multipliers: one for each adapter, or a single one for all, or none for 1.0. Patterns are full-match
    regular expressions on BFL module names: what `exclude_patterns` match stays as it is, and when there are
    `include_patterns`, only what they match is merged.

    Raises UserError for a wrong number of multipliers, and when the patterns leave nothing to merge.
    """
    include, exclude = compile_patterns(include_patterns), compile_patterns(exclude_patterns)
    plan = defaultdict(list)
    for adapter, strength in zip(adapters, spread(multipliers, len(adapters)), strict=True):
        for name, deltas in adapter.deltas.items():
            module = name.rpartition(".")[0]
            if not matches_any(exclude, module) and (not include or matches_any(include, module)):
                plan[name] += [(delta, strength.of(module)) for delta in deltas]
    if adapters and not plan:
        raise UserError(
            "The include and exclude patterns leave no module to merge. "
            "Patterns must match a whole name such as double_blocks.0.img_attn.qkv."
        )
    return dict(plan)


def spread(multipliers: Sequence[Multiplier], count: int) -> list[Strength]:
    """The strength of each of `count` adapters.

    Raises UserError for a number of multipliers that is neither 0, 1 nor `count`, and for a text that is none.
    """
    if len(multipliers) not in (0, 1, count):
        raise UserError(
            f"{len(multipliers)} multipliers were given for {count} LoRAs. "
            "--lora-multiplier takes one for each --lora-weight, or a single one for all."
        )
    strengths = [as_strength(multiplier) for multiplier in multipliers or (1.0,)]
    return strengths if len(strengths) == count else strengths * count


def merge_weight(weight: Tensor, changes: Sequence[tuple[Delta, float]]) -> Tensor:
    """weight + sum of strength * dW. Every dW is taken from the weight before merging: order means nothing.

    weight: float32, on the device where to compute; a tensor of its own, overwritten with the result.
    """
    needs_base = any(delta.change.needs_base for delta, _ in changes)
    base = weight.clone() if needs_base else weight
    with torch.no_grad():
        for delta, strength in changes:
            delta.add_to(weight, base, strength)
    return weight
