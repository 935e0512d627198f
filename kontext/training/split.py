"""A model split among the processes of a run (FSDP): each holds a part of every weight, gradient and optimizer state.

The optimizer, the average and the clipping see ordinary parameters, which are this process' parts: they share their
memory with what torch gathers when a block is used. All processes therefore take part in every use of the model, and in
every save.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from kontext.errors import UserError
from kontext.model.blocks import Modulation
from kontext.model.transformer import Transformer
from kontext.training.shares import Shares
from kontext.training.team import Team

T = TypeVar("T")


class Entrance(nn.Module):
    """Through here goes every use of a split model, whatever it calls of it: torch gathers what lies in no block."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, use: Callable[[], T]) -> T:
        return use()


class Parts(Shares):
    """This process' part of each parameter: rows of it, by torch.chunk."""

    def __init__(self, parameters: Mapping[str, DTensor], rank: int) -> None:
        self.split = parameters
        self.rank = rank
        self.parameters = {name: nn.Parameter(p.to_local().detach()) for name, p in parameters.items()}

    def shape(self, name: str, part: Tensor) -> torch.Size:
        return self.split[name].shape

    def whole(self, name: str, part: Tensor) -> Tensor:
        like = self.split[name]
        placed = DTensor.from_local(
            part.detach(), like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        )
        return placed.full_tensor()

    def own(self, name: str, whole: Tensor) -> Tensor:
        parts = whole.chunk(self.split[name].device_mesh.size())
        return parts[self.rank].clone() if self.rank < len(parts) else whole[:0].clone()


class SplitTeam(Team):
    """The processes of a run that share one model."""

    together = True

    def __init__(self, team: Team, model: nn.Module, parts: Parts) -> None:
        """model: the entrance to it."""
        super().__init__(team.accelerator)
        self.entrance = model
        self.shares: Parts = parts

    def run(self, use: Callable[[], T]) -> T:
        return self.entrance(use)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Takes the gradients from the split parameters to the parts. torch has left their mean there."""
        for name, part in self.shares.parameters.items():
            grad = self.shares.split[name].grad
            self.shares.split[name].grad = None
            part.grad = torch.zeros_like(part) if grad is None else grad.to_local().mul_(self.size)

    def norm(self, gradients: list[Tensor]) -> Tensor:
        return self.sum(super().norm(gradients).square()).sqrt()


def split(
    team: Team, model: Transformer, parameters: Mapping[str, nn.Parameter], dtype: torch.dtype
) -> SplitTeam:
    """Splits a model, whose weights may lie on the host: each block, each modulation, and the rest.

    parameters: those that are trained, by name; dtype: what the model computes in. Gradients are summed in float32.

    Raises UserError for float16, whose loss scale every process would find for itself.
    """
    if dtype == torch.float16:
        raise UserError("FSDP and --dtype float16 do not go together: use bfloat16.")
    # It warns of in-place changes to what modules return, of which there are none here.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    homes = _homes(model, parameters)
    mesh = init_device_mesh(team.device.type, (team.size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks():
        for module in [each for each in block.modules() if isinstance(each, Modulation)]:
            fully_shard(module, mesh=mesh, mp_policy=policy)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    entrance = fully_shard(Entrance(model), mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    there = {name: getattr(module, attribute) for name, (module, attribute) in homes.items()}
    return SplitTeam(team, entrance, Parts(there, team.rank))


def _homes(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, tuple[nn.Module, str]]:
    """The module and the attribute of each parameter: splitting puts others in their places."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    return {
        names[id(parameter)]: (module, attribute)
        for module in model.modules()
        for attribute, parameter in module.named_parameters(recurse=False)
        if id(parameter) in names
    }
