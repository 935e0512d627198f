"""How the small world learns: by the loop of `kontext train --network-module none`, text encoders with the transformer.

What differs from the command is what the batches hold: edits that were drawn and encoded in memory, with the ids of
their words, for the encoders of these are still to be trained. States lie beside `world.safetensors`, and a run that
was stopped goes on from them to the same bits.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.amp import GradScaler

from kontext.data.batches import Batch
from kontext.files import save_tensors
from kontext.timesteps import Timesteps
from kontext.training.ahead import Pass
from kontext.training.average import Average
from kontext.training.feed import Examples
from kontext.training.journal import HISTORY, REPORT, Journal
from kontext.training.loop import Updates
from kontext.training.names import Names
from kontext.training.network import groups_of
from kontext.training.objective import Objective
from kontext.training.optimizers import evaluation_weights, make_optimizer
from kontext.training.plan import Plan
from kontext.training.report import About, versions
from kontext.training.saving import Keep, SaveRules
from kontext.training.schedules import LearningRate
from kontext.training.seeds import seed_of
from kontext.training.session import Session, Start
from kontext.training.state import Progress, latest_state, read_progress
from kontext.training.team import Team
from kontext.training.writer import Job
from small_world.base import Pool, SmallWorld

BATCH = 32
RATE, WARMUP, DECAY = 1.5e-3, 100, 0.35
AVERAGE = 0.998
GUIDANCES = (1.0, 2.5, 3.5)
NOISE = Timesteps(sampling="shift", flow_shift=1.6)
FROM_TEXT = 0.12
LESSONS = (("recolor", "background", "remove"), ("reshape", "resize", "move"))
FIRST_LESSON = 0.15
STEPS_BETWEEN_SAVES = 400
SEED = 0


class Lessons:
    """One epoch of `steps` batches: edits, and in a few batches captions without a reference.

    txt and vector of a batch are the ids of T5 (B, T) and CLIP (B, V).
    """

    def __init__(self, pool: Pool, steps: int) -> None:
        self.pool, self.steps = pool, steps

    def sizes(self, epoch: int) -> list[int]:
        return [BATCH] * self.steps

    def load(self, epoch: int, index: int) -> Batch:
        rng = random.Random(seed_of("lesson", SEED, index))
        rows = self._rows(rng, index / self.steps)
        if rng.random() < FROM_TEXT:
            latents, ids, references = self.pool.before[rows], self.pool.captions, ()
        else:
            latents, ids = self.pool.after[rows], self.pool.instructions
            references = (self.pool.before[rows],)
        keys = tuple(f"edit {row}" for row in rows.tolist())
        return Batch(latents=latents, references=references, txt=ids[0][rows], vector=ids[1][rows], keys=keys)

    def _rows(self, rng: random.Random, progress: float) -> Tensor:
        """Rows of one batch: the first lesson alone at first, then all kinds alike."""
        kinds = LESSONS[0] if progress < FIRST_LESSON else LESSONS[0] + LESSONS[1]
        chosen = [self.pool.kinds[rng.choice(kinds)] for _ in range(BATCH)]
        return torch.stack([rows[rng.randrange(len(rows))] for rows in chosen])


@dataclass(frozen=True)
class Reading(Objective):
    """The loss of the transformer on what the world's text encoders make of the ids, at one of several guidances."""

    world: SmallWorld | None = None

    def losses(self, asked: Pass) -> Tensor:
        assert self.world is not None
        example, batch = asked.example, asked.example.batch
        txt, vector = self.world.text((batch.txt, batch.vector))
        read = replace(example, batch=replace(batch, txt=txt, vector=vector))
        told = GUIDANCES[seed_of("guidance", SEED, example.index) % len(GUIDANCES)]
        objective = Objective(self.transformer, self.timesteps, told, self.run)
        return objective.losses(replace(asked, example=read))


def train(pool: Pool, world: SmallWorld, *, steps: int, device: torch.device, folder: Path) -> SmallWorld:
    """`world` with the averaged weights after `steps` steps. Goes on from a state in `folder` if there is one."""
    world.to(device).train()
    names = Names(folder, "world")
    parameters = dict(world.named_parameters())
    plan = Plan(batches=steps, accumulation=1, processes=1, steps=steps)
    updates = _updates(world, steps)
    average = Average(parameters, AVERAGE)
    team = Team(Accelerator(cpu=device.type == "cpu"))
    start = _start(names)
    start.load(updates, team, average)

    def keep(path: Path, done: int) -> Job:
        return partial(save_tensors, path, {name: value.clone() for name, value in average.values.items()})

    about = About("world", plan, (), versions(device), folder)
    Session(
        team=team,
        examples=Examples(Lessons(pool, steps), plan, seed=SEED),
        workers=0,
        objective=Reading(world.transformer, NOISE, 1.0, world=world),
        updates=updates,
        start=start,
        names=names,
        rules=_rules(),
        settings={"steps": steps},
        average=average,
        adapter=keep,
        weights=partial(evaluation_weights, updates.optimizer, list(parameters.values())),
        previews=None,
        held=None,
        log=lambda values, step: None,
        journal=Journal(
            names.final(HISTORY), names.final(REPORT), about, done=start.progress.step, wanted=True
        ),
    ).run()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(average.values[name])
    return world.eval()


def _rules() -> SaveRules:
    kept = Keep(steps=STEPS_BETWEEN_SAVES)
    return SaveRules(every_steps=STEPS_BETWEEN_SAVES, adapters=kept, states=kept, with_state=True)


def _start(names: Names) -> Start:
    folder = latest_state(names.states())
    return (
        Start(None, Progress(step=0, settings={})) if folder is None else Start(folder, read_progress(folder))
    )


def _updates(world: SmallWorld, steps: int) -> Updates:
    """AdamW, warmed up, flat, and falling in the last third; gradients are clipped to norm 1."""
    parameters = dict(world.named_parameters())
    groups = groups_of(parameters, rate=RATE, plus_ratio=1.0)
    rate = LearningRate(
        RATE, "warmup_stable_decay", steps, warmup=min(WARMUP, steps // 2), decay=round(DECAY * steps)
    )
    return Updates(
        parameters=parameters,
        optimizer=make_optimizer("adamw", groups, arguments={"betas": (0.9, 0.98), "weight_decay": 0.01}),
        rates=[rate],
        max_norm=1.0,
        scaler=GradScaler("cpu", enabled=False),
    )
