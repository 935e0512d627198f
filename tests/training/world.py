"""A small transformer and a dataset in memory, for tests of the training loop."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.amp import GradScaler

from kontext.data.batches import Batch
from kontext.model.transformer import Transformer, TransformerConfig
from kontext.timesteps import Timesteps
from kontext.training.feed import Examples, feed
from kontext.training.loop import Listener, Outcome, Updates, train
from kontext.training.network import Network, build, groups_of, parameters_of
from kontext.training.objective import Objective
from kontext.training.optimizers import make_optimizer
from kontext.training.plan import Plan
from kontext.training.schedules import LearningRate
from kontext.training.seeds import seed_of
from kontext.training.team import Team

CONFIG = TransformerConfig(
    in_channels=64, out_channels=64, context_width=24, vector_width=12, width=32, heads=2, mlp_width=64,
    double_blocks=1, single_blocks=2, axes=(2, 6, 8), theta=10_000.0, guidance=True,
)  # fmt: skip
SEED = 7


class MemoryBatches:
    """Items in memory, of two sizes, with and without a reference; two to a batch, in an order drawn per epoch."""

    def __init__(self, items: int = 10, *, seed: int = SEED) -> None:
        self.items = items
        self.seed = seed

    def order(self, epoch: int) -> list[list[int]]:
        rng = random.Random(seed_of("order", self.seed, epoch))
        wide, square = list(range(0, self.items, 2)), list(range(1, self.items, 2))
        rng.shuffle(wide)
        rng.shuffle(square)
        batches = [group[i : i + 2] for group in (wide, square) for i in range(0, len(group), 2)]
        rng.shuffle(batches)
        return batches

    def sizes(self, epoch: int) -> list[int]:
        return [len(batch) for batch in self.order(epoch)]

    def load(self, epoch: int, index: int) -> Batch:
        items = self.order(epoch)[index]
        parts = [self.item(i) for i in items]
        references = (torch.stack([p[1] for p in parts]),) if items[0] % 2 else ()
        return Batch(
            latents=torch.stack([p[0] for p in parts]),
            references=references,
            txt=torch.stack([p[2] for p in parts]),
            vector=torch.stack([p[3] for p in parts]),
            keys=tuple(f"item{i}" for i in items),
        )

    def item(self, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        g = torch.Generator().manual_seed(1000 + i)
        shape = (16, 8, 8) if i % 2 else (16, 4, 8)
        return (
            torch.randn(shape, generator=g), torch.randn(16, 4, 4, generator=g),
            torch.randn(6, 24, generator=g), torch.randn(12, generator=g),
        )  # fmt: skip


def small_transformer(seed: int = 0) -> Transformer:
    model = Transformer(CONFIG)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(
                scale * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1) * 0.5
            )
    return model


class Run:
    """A whole run on the CPU, whose pieces tests may look at and change before `go`."""

    def __init__(
        self,
        *,
        steps: int = 12,
        accumulation: int = 1,
        optimizer: str = "adamw",
        network: Network | None = None,
        workers: int = 0,
        persistent: bool = True,
        schedule: str = "constant",
        rate: float = 1e-2,
        items: int = 10,
        buckets: int | None = None,
        wrap: Callable[[Transformer], None] = lambda model: None,
    ) -> None:
        network = network or Network(rank=4, alpha=4)
        self.transformer = small_transformer()
        self.modules = build(self.transformer, network, seed=SEED)
        wrap(self.transformer)
        self.parameters = parameters_of(self.modules)
        groups = groups_of(self.parameters, rate=rate, plus_ratio=network.plus_ratio)
        self.optimizer = make_optimizer(optimizer, groups, arguments={})
        self.batches = MemoryBatches(items)
        self.plan = Plan(len(self.batches.sizes(0)), accumulation, 1, steps)
        rates = [LearningRate(group["lr"], schedule, steps, warmup=2) for group in groups]
        self.updates = Updates(self.parameters, self.optimizer, rates, 1.0, GradScaler("cpu", enabled=False))
        self.team = Team(Accelerator(cpu=True))
        self.objective = Objective(self.transformer, Timesteps(), 1.0)
        self.examples = Examples(self.batches, self.plan, seed=SEED, buckets=buckets)
        self.workers, self.persistent = workers, persistent
        self.losses: list[float] = []

    def go(self, *, first_step: int = 0, listeners: Sequence[Listener] = ()) -> "Run":
        examples = feed(
            self.examples, first_step=first_step, rank=0, workers=self.workers, persistent=self.persistent,
            device=torch.device("cpu"),
        )  # fmt: skip
        train(
            self.objective, self.updates, plan=self.plan, examples=examples, team=self.team, seed=SEED,
            first_step=first_step, listeners=[self.note, *listeners],
        )  # fmt: skip
        return self

    def note(self, outcome: Outcome) -> None:
        self.losses.append(outcome.loss.item())

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def same_weights(self, other: "Run") -> bool:
        return all(torch.equal(weight, other.weights()[name]) for name, weight in self.weights().items())


class Stop(Exception):
    """What a run is broken off with."""


def stop_after(step: int, then: Callable[[int], Path]) -> Listener:
    """A listener that saves with `then` after step `step` (from 0) and breaks the run off a step later."""

    def listen(outcome: Outcome) -> None:
        if outcome.step == step:
            then(step + 1)
        if outcome.step == step + 1:
            raise Stop

    return listen
