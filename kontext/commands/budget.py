"""`--vram-budget`: what options leave open is chosen so that the run fits, and what is chosen is told."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch

from kontext import console
from kontext.commands.memory_table import GIBIBYTE, size
from kontext.errors import UserError
from kontext.memory.choice import (
    POLICIES,
    Choice,
    Setup,
    Time,
    choose,
    lightened,
    picture_time,
    possible_swaps,
    setups,
    step_time,
)
from kontext.memory.estimate import CONTEXT, TRAINING_STEP
from kontext.memory.free import free_bytes
from kontext.memory.needs import PictureNeeds, TrainingNeeds, in_strips
from kontext.memory.policies import Policy
from kontext.memory.streaming import Swap, streamed_blocks
from kontext.model.transformer import TransformerConfig
from kontext.options.generate import Generate
from kontext.options.train import Train

O = TypeVar("O", Generate, Train)
RECOMPUTING = ("checkpointing", "gradient_checkpointing", "gradient_checkpointing_cpu_offload")
REMEDIES = {
    "reading the prompt": "--fp8-t5 halves that",
    TRAINING_STEP: "use a smaller resolution or batch, or weights in fewer bits (--fp8-scaled, --nf4)",
    "a step of the optimizer": "use --optimizer-type adamw8bit or a smaller rank",
    "denoising": "make a smaller picture, or keep weights in fewer bits (--fp8-scaled, --nf4)",
}
"""What helps where a stage is too large."""


def for_training(options: Train, needs: TrainingNeeds, device: torch.device) -> Train:
    """The options with what --vram-budget chooses. Raises UserError if nothing fits."""
    from kontext.commands import train_values, train_whole  # half a second that pictures do not wait for

    mix = train_values.mix(options)
    frozen = not train_whole.is_whole(options)
    possible: Iterable[Setup] = setups(
        needs.weights.config,
        swaps=_swaps(options, needs.weights.config) if frozen else [0],
        modulations=_modulations(options) if frozen and not needs.whole_modulation else [False],
        policies=_policies(options) if _recomputes_freely(options) else (mix.policy,),
    )
    if mix.count is not None:
        possible = [replace(setup, count=mix.count) for setup in possible]
    return _within(options, needs, possible, step_time(needs.weights, needs.work), device)


def for_pictures(options: Generate, needs: PictureNeeds, device: torch.device) -> Generate:
    """The same for making pictures."""
    config = needs.weights.config
    possible = setups(config, swaps=_swaps(options, config), modulations=_modulations(options))
    return _within(options, needs, possible, picture_time(needs.weights, needs.pictures.work), device)


def _within(
    options: O,
    needs: TrainingNeeds | PictureNeeds,
    possible: Iterable[Setup],
    time: Callable[[Setup], Time],
    device: torch.device,
) -> O:
    asked = _asked(options)
    if asked is None:
        return options
    if device.type != "cuda":
        console.notice(f"{asked}: on a CPU there is nothing to choose.")
        return options
    budget = _bytes(options.vram_budget or "auto", device)
    setups = list(possible)
    for strips in _strips(options, needs):
        smaller = in_strips(needs) if strips else needs
        peak = partial(_peak, smaller)
        found = choose(setups, peak=peak, time=time, budget=budget)
        if found.setup is not None:
            setup = found.setup
            if _recomputes_freely(options) and not options.compile:
                setup = lightened(setup, needs.weights.config, peak=peak, budget=budget)
            _tell(options, smaller, setup, strips)
            return options.model_copy(update=_chosen(options, setup, strips))
    raise _refusal(options, smaller, setups, found)


def _peak(needs: TrainingNeeds | PictureNeeds, setup: Setup) -> int:
    return needs.estimate(setup).peak


def _asked(options: Generate | Train) -> str | None:
    """The option that asks for a choice, as it was given."""
    if options.vram_budget is not None:
        return f"--vram-budget {options.vram_budget}"
    return "--checkpointing auto" if isinstance(options, Train) and options.checkpointing == "auto" else None


def _recomputes_freely(options: Generate | Train) -> bool:
    """Whether what blocks compute again is open."""
    if not isinstance(options, Train):
        return False
    return options.checkpointing == "auto" or not options.model_fields_set & set(RECOMPUTING)


def _policies(options: Train) -> Sequence[Policy]:
    """What blocks may compute again. A compiler makes its own choice between everything and nothing."""
    return [policy for policy in POLICIES if policy != "selective"] if options.compile else POLICIES


def _bytes(words: str, device: torch.device) -> int:
    """What the run may take, CUDA's own part among it. Asking a GPU what is free starts CUDA."""
    return free_bytes(device) + CONTEXT if words == "auto" else int(float(words) * GIBIBYTE)


def _swaps(options: Generate | Train, config: TransformerConfig) -> list[Swap]:
    if "blocks_to_swap" not in options.model_fields_set and options.vram_budget is not None:
        return possible_swaps(config)
    return ["max" if options.blocks_to_swap == "max" else int(options.blocks_to_swap)]


def _modulations(options: Generate | Train) -> list[bool]:
    if options.vram_budget is None:
        return [options.modulation == "auto"]
    return [False] if options.modulation == "resident" else [False, True]


def _strips(options: Generate | Train, needs: TrainingNeeds | PictureNeeds) -> tuple[bool, ...]:
    """Whether the autoencoder is to work in strips: first not, then also if that is left open."""
    open_ = needs.vae is not None and "vae_tiling" not in options.model_fields_set
    return (False, True) if open_ else (False,)


def _chosen(options: Generate | Train, setup: Setup, strips: bool) -> dict[str, Any]:
    """The options that stand for a setup."""
    chosen: dict[str, Any] = {
        "blocks_to_swap": str(setup.placement.swap),
        "modulation": "auto" if setup.placement.modulation else "resident",
    }
    if isinstance(options, Train) and _recomputes_freely(options):
        offloaded = setup.policy == "offloaded"
        chosen["checkpointing"] = "whole" if offloaded else str(setup.mix)
        chosen["gradient_checkpointing_cpu_offload"] = offloaded
    return chosen | ({"vae_tiling": "on"} if strips else {})


def _tell(options: Generate | Train, needs: TrainingNeeds | PictureNeeds, setup: Setup, strips: bool) -> None:
    config, placement = needs.weights.config, setup.placement
    streamed = sum(map(len, streamed_blocks(config.double_blocks, config.single_blocks, placement.swap)))
    what = []
    if placement.modulation:
        what.append("modulation waits on the host")
    if streamed:
        what.append(f"{streamed} of {config.double_blocks + config.single_blocks} blocks are streamed")
    if isinstance(options, Train) and setup.policy != "none":
        again = "whole, with its inputs on the host" if setup.policy == "offloaded" else str(setup.mix)
        what.append(f"--checkpointing {again}")
    if strips:
        what.append("the autoencoder works in strips")
    found = needs.estimate(setup)
    console.say(
        f"{_asked(options)}: {', '.join(what) or 'everything stays on the GPU'}. Of what fits this loses "
        f"the least time; the peak is estimated at {size(found.peak)}, in {found.largest.name}."
    )


def _refusal(
    options: Generate | Train, needs: TrainingNeeds | PictureNeeds, setups: Iterable[Setup], found: Choice
) -> UserError:
    least = min((needs.estimate(setup) for setup in setups), key=lambda estimate: estimate.peak)
    remedy = REMEDIES.get(least.largest.name, "make a smaller picture")
    return UserError(
        f"{_asked(options)}: nothing fits. The least that this takes is {size(found.smallest)}, in "
        f"{least.largest.name}: {remedy}."
    )
