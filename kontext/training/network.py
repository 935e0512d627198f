"""The adapter in training: how it is built, and its parameters by name and by learning rate."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kontext.errors import UserError
from kontext.lora.adapter import LoraLinear, attach
from kontext.model.transformer import Transformer
from kontext.training.arguments import Value


@dataclass(frozen=True)
class Network:
    """A LoRA. plus_ratio: by how much the learning rate of `lora_up` exceeds that of `lora_down` (LoRA+)."""

    rank: int
    alpha: float
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    include_patterns: tuple[str, ...] = ()
    exclude_patterns: tuple[str, ...] = ()
    plus_ratio: float = 1.0


def network_of(rank: int, alpha: float | None, dropout: float, arguments: Mapping[str, Value]) -> Network:
    """The network that the options describe, `arguments` being those of `--network-args`.

    Raises UserError for an argument that is unknown or of the wrong type.
    """
    readers = {
        "rank_dropout": ("rank_dropout", _share),
        "module_dropout": ("module_dropout", _share),
        "include_patterns": ("include_patterns", _patterns),
        "exclude_patterns": ("exclude_patterns", _patterns),
        "loraplus_lr_ratio": ("plus_ratio", _positive),
    }
    fields: dict[str, Any] = {}
    for key, value in arguments.items():
        if key not in readers:
            raise UserError(f"--network-args: {key} is not known. Known are {', '.join(readers)}.")
        field, read = readers[key]
        fields[field] = read(key, value)
    return Network(rank, rank if alpha is None else alpha, dropout, **fields)


def _share(key: str, value: Value) -> float:
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise UserError(f"--network-args: {key} must be a number from 0 to below 1, not {value!r}.")
    return float(value)


def _positive(key: str, value: Value) -> float:
    if not isinstance(value, int | float) or value <= 0:
        raise UserError(f"--network-args: {key} must be a number above 0, not {value!r}.")
    return float(value)


def _patterns(key: str, value: Value) -> tuple[str, ...]:
    """One regex, or a list of them."""
    patterns = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise UserError(f"--network-args: {key} must be a regex or a list of regexes, not {value!r}.")
    return patterns


def build(
    transformer: Transformer, network: Network, *, seed: int, device: torch.device | None = None
) -> dict[str, LoraLinear]:
    """Attaches a fresh network to the transformer, which it freezes; the adapters by module name.

    device: where adapters live, if not beside the weights, which may wait on the host.
    """
    return attach(
        transformer,
        rank=network.rank,
        alpha=network.alpha,
        seed=seed,
        dropout=network.dropout,
        rank_dropout=network.rank_dropout,
        module_dropout=network.module_dropout,
        include_patterns=network.include_patterns,
        exclude_patterns=network.exclude_patterns,
        device=device,
    )


def parameters_of(modules: Mapping[str, LoraLinear]) -> dict[str, nn.Parameter]:
    """What is trained, by name."""
    return {
        f"{name}.{part}.weight": getattr(module, part).weight
        for name, module in modules.items()
        for part in ("lora_down", "lora_up")
    }


def groups_of(
    parameters: Mapping[str, nn.Parameter], *, rate: float, plus_ratio: float
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: one, or with LoRA+ one for each of the two factors."""
    if plus_ratio == 1:
        return [{"params": list(parameters.values()), "lr": rate}]
    up = {name for name in parameters if name.endswith("lora_up.weight")}
    return [
        {"params": [p for name, p in parameters.items() if name not in up], "lr": rate},
        {"params": [p for name, p in parameters.items() if name in up], "lr": rate * plus_ratio},
    ]
