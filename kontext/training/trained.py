"""What a run trains: adapters beside a frozen transformer, or weights of the transformer itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from kontext import console
from kontext.errors import UserError
from kontext.files import save_tensors
from kontext.lora.as_loaded import AsLoaded
from kontext.lora.files import kohya_tensors
from kontext.lora.linear import AdapterLinear
from kontext.lora.patterns import compile_patterns, matches_any
from kontext.model.transformer import Transformer
from kontext.training.metadata import hashes
from kontext.training.network import Network, parameters_of
from kontext.training.team import Team
from kontext.training.writer import Job


class Trained(Protocol):
    """What the optimizer changes, and how it becomes a file."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """All of it, by name."""

    @property
    def count(self) -> int:
        """How many numbers that are."""

    @property
    def modules(self) -> int:
        """In how many modules of the transformer it is."""

    @property
    def file_bytes(self) -> int:
        """Of the tensors in its file."""

    def copy(self, path: Path, fields: Mapping[str, str], spec: Mapping[str, str]) -> Job:
        """Takes the weights as they are now; the job writes them to `path` with `ss_*` and modelspec fields."""


@dataclass(frozen=True)
class Adapters:
    """Adapters by module name, written in the kohya/musubi layout in `dtype`."""

    adapters: Mapping[str, AdapterLinear]
    dtype: torch.dtype

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return parameters_of(self.adapters)

    @property
    def count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def modules(self) -> int:
        return len(self.adapters)

    @property
    def file_bytes(self) -> int:
        alphas = len(self.adapters)
        return (alphas + sum(p.numel() for p in self.parameters.values())) * self.dtype.itemsize

    def copy(self, path: Path, fields: Mapping[str, str], spec: Mapping[str, str]) -> Job:
        return partial(_write, path, kohya_tensors(self.adapters, self.dtype), fields, spec)


def _write(
    path: Path, tensors: Mapping[str, Tensor], fields: Mapping[str, str], spec: Mapping[str, str]
) -> None:
    save_tensors(path, tensors, {**fields, **spec, **hashes(tensors, fields)})
    console.say(f"Saved {path}")


@dataclass(frozen=True)
class Weights:
    """Parameters of the transformer by BFL name, written with those that stay in the layout that was loaded."""

    parameters: Mapping[str, nn.Parameter]
    layout: AsLoaded
    team: Team

    @property
    def modules(self) -> int:
        return len({name.rpartition(".")[0] for name in self.parameters})

    @property
    def count(self) -> int:
        shares = self.team.shares
        return sum(shares.shape(name, parameter).numel() for name, parameter in self.parameters.items())

    @property
    def file_bytes(self) -> int:
        return self.layout.bytes

    def copy(self, path: Path, fields: Mapping[str, str], spec: Mapping[str, str]) -> Job:
        """Writes at once: a copy of a whole model would need as much memory again, and without one there is time only
        until the next step of the optimizer, or until the average takes the place of the weights.
        """
        stored = self.layout.stored()
        if not self.team.leads:
            for name in stored:
                self._trained(name)
            return lambda: None

        def value(name: str) -> Tensor:
            found = self._trained(name)
            return stored[name].load() if found is None else found

        self.layout.write(path, value, {**fields, **spec})
        return lambda: console.say(f"Saved {path}")

    def _trained(self, name: str) -> Tensor | None:
        """All of a parameter that is trained; None for another."""
        parameter = self.parameters.get(name)
        return None if parameter is None else self.team.shares.whole(name, parameter)


def thaw(
    transformer: Transformer, network: Network, *, stored: torch.dtype, rest: torch.dtype
) -> dict[str, nn.Parameter]:
    """Makes a frozen transformer's parameters trainable; by name, those of the modules that the network's patterns choose.

    What is trained is kept in `stored`, and the rest in `rest`. Raises UserError when the patterns leave nothing.
    """
    chosen = _chosen(transformer, network)
    parameters = {}
    for name, parameter in transformer.named_parameters():
        trained = name.rpartition(".")[0] in chosen
        parameter.data = parameter.data.to(stored if trained else rest)
        if trained:
            parameters[name] = parameter.requires_grad_()
    return parameters


def _chosen(transformer: Transformer, network: Network) -> set[str]:
    """Names of the modules to train: all; with include patterns those that match; without what exclude patterns match.

    With both, a module that both match is trained, as with adapters.
    """
    include, exclude = compile_patterns(network.include_patterns), compile_patterns(network.exclude_patterns)
    names = {name.rpartition(".")[0] for name, _ in transformer.named_parameters()}
    others = set() if include and not exclude else {name for name in names if not matches_any(exclude, name)}
    chosen = others | {name for name in names if matches_any(include, name)}
    if not chosen:
        raise UserError(
            "No module is left to train: the include and exclude patterns leave none. "
            "Patterns must match a whole name such as double_blocks.0.img_attn.qkv."
        )
    return chosen
