"""Adapters for training: which linears get one, and putting it there."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from kontext.errors import UserError
from kontext.lora.linear import AdapterLinear, LoraLinear
from kontext.lora.patterns import left_by

DEFAULT_EXCLUDE = (
    r"(?!(double|single)_blocks\.).*",
    r".*_mod\.lin",
    r".*modulation\.lin",
    r".*norm.*",
)


@dataclass(frozen=True)
class Size:
    """Rank of an adapter, and alpha: it acts with strength alpha / rank. factor: of a LoKr with one of its own."""

    rank: int
    alpha: float
    factor: int | None = None


def attach(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    seed: int,
    include_patterns: Sequence[str] = (),
    exclude_patterns: Sequence[str] = (),
    device: torch.device | str | None = None,
) -> dict[str, AdapterLinear]:
    """Put a LoRA of one size around every targeted linear of `model`; see `targets` and `wrap`.

    Raises UserError when a pattern is no regular expression or no linear is left.
    """
    names = targets(model, include_patterns=include_patterns, exclude_patterns=exclude_patterns)
    return wrap(model, dict.fromkeys(names, Size(rank, alpha)), seed=seed, device=device)


def wrap(
    model: nn.Module,
    sizes: Mapping[str, Size],
    *,
    seed: int,
    make: Callable[..., AdapterLinear] = LoraLinear,
    device: torch.device | str | None = None,
) -> dict[str, AdapterLinear]:
    """Put adapters of these sizes around linears of `model` and return them by dotted name, in the order of `sizes`.

    make: the class of adapter, with the settings that all share. The whole model is frozen; only the adapters ask
    for gradients. The first weights depend on `seed` and the sizes alone, not on the device. They live on `device`,
    by default the base's.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, size in sizes.items():
        own = {} if size.factor is None else {"factor": size.factor}
        module = make(model.get_submodule(name), rank=size.rank, alpha=size.alpha, device=device, **own)
        module.draw(generator)
        model.set_submodule(name, module)
        modules[name] = module
    return modules


def targets(
    model: nn.Module, *, include_patterns: Sequence[str] = (), exclude_patterns: Sequence[str] = ()
) -> list[str]:
    """Dotted names of the linears to adapt: those of the blocks, without modulation and norms.

    Patterns are regular expressions that must match a whole name. `exclude_patterns` add to the default
    exclusion; a name that `include_patterns` match is taken whatever excludes it.
    """
    everything = (name for name, _ in linears(model))
    names = left_by((*DEFAULT_EXCLUDE, *exclude_patterns), include_patterns, everything)
    if not names:
        raise UserError(
            "No layer is left to train: the exclude patterns match all of them. "
            "Patterns must match a whole name such as double_blocks.0.img_attn.qkv."
        )
    return names


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(dotted name, module) of everything linear, in model order."""
    for name, module in model.named_modules():
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            yield name, module
