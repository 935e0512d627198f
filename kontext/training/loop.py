"""The training loop: gradients of a group of batches, one optimizer step, and word of it to whoever listens."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from kontext.lora.limit import Limit
from kontext.training.ahead import Pass, prepared
from kontext.training.feed import Example
from kontext.training.objective import Objective
from kontext.training.plan import Plan
from kontext.training.schedules import LearningRate
from kontext.training.seeds import seed_of
from kontext.training.team import Team


@dataclass(frozen=True)
class Item:
    """An item of a step, its noise level and its own loss."""

    key: str
    t: float
    loss: float


@dataclass(frozen=True)
class Seen:
    """Which items a loss is of, and at which noise levels. losses (B,): each item's part of the step's; share: theirs."""

    keys: tuple[str, ...]
    t: Tensor
    losses: Tensor
    share: float

    def items(self) -> list[Item]:
        """One by one, read from the device."""
        return list(map(Item, self.keys, self.t.tolist(), self.own_losses))

    def on_host(self) -> "Seen":
        """The same, read from the device."""
        return replace(self, losses=self.losses.cpu())

    @property
    def own_losses(self) -> list[float]:
        """The loss of each item by itself, read from the device."""
        return [loss * len(self.t) / self.share for loss in self.losses.tolist()]


@dataclass(frozen=True)
class Outcome:
    """What a step did. Its tensors may still be in the making on a GPU: reading them waits.

    step: counted from 0; loss: this process' part of the mean over the items of the step.
    """

    step: int
    loss: Tensor
    norm: Tensor
    rates: tuple[float, ...]
    seen: tuple[Seen, ...]


Listener = Callable[[Outcome], None]


@dataclass(frozen=True)
class Updates:
    """How gradients change the parameters: optimizer, learning rate per parameter group, clipping, loss scale.

    limit: on the norms of the adapters' changes, kept after every step.
    """

    parameters: Mapping[str, nn.Parameter]
    optimizer: Optimizer
    rates: Sequence[LearningRate]
    max_norm: float
    scaler: GradScaler
    limit: Limit | None = None

    def set_rates(self, step: int) -> tuple[float, ...]:
        """Puts the learning rates of `step` into the optimizer, and returns them as they act.

        Prodigy and its kind multiply them with a rate that they find themselves, the `d` of a group.
        """
        values = tuple(rate.peak * rate.factor(step) for rate in self.rates)
        for group, value in zip(self.optimizer.param_groups, values, strict=True):
            group["lr"] = value
        groups = self.optimizer.param_groups
        return tuple(value * float(group.get("d", 1.0)) for group, value in zip(groups, values, strict=True))

    def apply(self, team: Team) -> Tensor:
        """One optimizer step; the norm that the gradients had before clipping (max_norm 0: no clipping)."""
        self.scaler.unscale_(self.optimizer)
        parameters = list(self.parameters.values())
        norm = team.norm([parameter.grad for parameter in parameters])
        nn.utils.clip_grads_with_norm_(parameters, self.max_norm or float("inf"), norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.limit is not None:
            self.limit()
        return norm


def train(
    objective: Objective,
    updates: Updates,
    *,
    plan: Plan,
    examples: Iterator[Example],
    team: Team,
    seed: int,
    first_step: int,
    listeners: Sequence[Listener],
) -> None:
    """Runs steps `first_step` to the end of the plan; `listeners` hear of each, in their order.

    `examples` are this process' batches in the plan's order.
    """
    objective.transformer.train()
    asked = (Pass(example, objective.levels(example)) for example in examples)
    passes = prepared(asked, objective.transformer, objective.guidance, team.device)
    for step in range(first_step, plan.steps):
        rates = updates.set_rates(step)
        mine = plan.group(step)[team.rank :: plan.processes]
        seen = tuple(gradients(objective, next(passes), updates.scaler, seed) for _ in mine)
        if team.together and len(mine) < plan.rounds(step):
            gradients(objective, _uncounted(next(passes)), updates.scaler, seed)
        team.sum_gradients(updates.parameters.values())
        norm = updates.apply(team)
        loss = sum((part.losses.sum() for part in seen), torch.zeros((), device=team.device))
        for listener in listeners:
            listener(Outcome(step, loss, norm, rates, seen))


def _uncounted(asked: Pass) -> Pass:
    """The same with no part in the loss: other processes need this one's part of the model."""
    return replace(asked, example=replace(asked.example, share=0.0))


def gradients(objective: Objective, asked: Pass, scaler: GradScaler, seed: int) -> Seen:
    """Adds the gradients of one batch. Its items count by their share in the step.

    Dropout draws from torch's global generators, which are seeded here, so that it does not depend on anything
    that happened before.
    """
    example = asked.example
    seed_dropout(seed_of("dropout", seed, example.epoch, example.index), example.noise.device)
    losses = objective.losses(asked) * (example.share / len(asked.t))
    total = scaler.scale(losses.sum())
    if total.requires_grad:  # not when dropout skips all adapters
        total.backward()
    return Seen(example.batch.keys, asked.t, losses.detach(), example.share)


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seeds the global generators of the CPU and of `device`: torch.manual_seed takes a millisecond without a GPU."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
