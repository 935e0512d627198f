"""Adapters beside a model, not merged into it: for coarse weights, and for strengths that change."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kontext.errors import UserError
from kontext.lora.deltas import Delta, Kronecker, LowRank
from kontext.lora.files import AdapterFile
from kontext.lora.linear import plain_weight
from kontext.lora.merge import plan_merge, spread
from kontext.lora.strength import Block, Multiplier, Strength, block_of


class Branched(nn.Module):
    """W x + b + sum of strength * (dW x + db), for a linear of any kind. For inference.

    weights, biases: what is added, with the number of its adapter; strengths: by adapter, shared by all
    linears of a model; block: the one that the linear is in.
    """

    def __init__(self, base: nn.Module, strengths: list[Strength], block: Block | None = None) -> None:
        super().__init__()
        self.base, self.block = base, block
        self.strengths = strengths
        self.weights: list[tuple[Delta, int]] = []
        self.biases: list[tuple[Delta, int]] = []

    @property
    def weight(self) -> Tensor:
        """The base's weight: what asks a linear for its device and dtype sees no difference."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        out = self.base(x)
        strengths = [strength.at(self.block) for strength in self.strengths]
        for delta, adapter in self.weights:
            if strengths[adapter]:
                self._add(delta, x, strengths[adapter], out[..., _rows(delta)])
        for delta, adapter in self.biases:
            out[..., _rows(delta)] += strengths[adapter] * delta.change.dense(x).to(x.dtype)
        return out

    def _add(self, delta: Delta, x: Tensor, strength: float, out: Tensor) -> None:
        """out += strength * dW x, in one pass over it: through the factors of a LoRA no tensor of its size is made."""
        if isinstance(delta.change, LowRank):
            delta.change.add_product(x, strength, out)
        else:
            out.add_(self._product(delta, x), alpha=strength)

    def _product(self, delta: Delta, x: Tensor) -> Tensor:
        """dW x: through the factors where that is exact and cheap, else with dW made for this call."""
        if isinstance(delta.change, Kronecker):
            return delta.change.apply(x)
        weight = self.base.weight
        if delta.change.needs_base:
            weight = plain_weight(self.base)
        return F.linear(x, delta.change.dense(weight[_rows(delta)]).to(x.dtype))


@dataclasses.dataclass(frozen=True)
class Attached:
    """Adapters beside a model."""

    modules: dict[str, Branched]
    strengths: list[Strength]

    def set_strengths(self, multipliers: Sequence[Multiplier]) -> None:
        """New strengths, from the next forward pass on. Raises UserError for a wrong number of them."""
        self.strengths[:] = spread(multipliers, len(self.strengths))


def attach_adapters(
    model: nn.Module,
    adapters: Sequence[AdapterFile],
    multipliers: Sequence[Multiplier],
    *,
    device: torch.device | None = None,
    include_patterns: Sequence[str] = (),
    exclude_patterns: Sequence[str] = (),
) -> Attached:
    """Put `adapters` beside the linears of `model`; see `plan_merge` for the arguments and errors.

    device: where they live; by default beside the weights, which may be elsewhere than they compute.

    Raises UserError for changes of norms, which have no linear to stand beside.
    """
    strengths = spread(multipliers, len(adapters))
    modules: dict[str, Branched] = {}
    for number, adapter in enumerate(adapters):
        plan = plan_merge([adapter], [], include_patterns=include_patterns, exclude_patterns=exclude_patterns)
        for tensor, changes in plan.items():
            name, _, kind = tensor.rpartition(".")
            if kind == "scale":
                raise UserError(
                    f"{adapter.path} changes the norm {name}: it can be merged, but not attached."
                )
            module = modules.get(name) or _branch(model, name, strengths)
            modules[name] = module
            home = device or module.base.weight.device
            deltas = [(_moved(delta, home), number) for delta, _ in changes]
            (module.weights if kind == "weight" else module.biases).extend(deltas)
    return Attached(modules, strengths)


def _branch(model: nn.Module, name: str, strengths: list[Strength]) -> Branched:
    module = Branched(model.get_submodule(name), strengths, block_of(name))
    model.set_submodule(name, module)
    return module


def _moved(value: Any, device: torch.device) -> Any:
    """A delta or change with all its tensors on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if not dataclasses.is_dataclass(value):
        return value
    fields = {f.name: _moved(getattr(value, f.name), device) for f in dataclasses.fields(value)}
    return dataclasses.replace(value, **fields)


def _rows(delta: Delta) -> slice:
    return slice(delta.target.start, delta.target.stop)
