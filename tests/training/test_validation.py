from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kontext.data.batches import Batch
from kontext.training.loop import Outcome
from kontext.training.network import Network
from kontext.training.plan import Plan
from kontext.training.seeds import draw_noise
from kontext.training.validation import LEVELS, Every, Held, Validation
from tests.training.world import MemoryBatches, Run

TWICE = Every(steps=2)


class HeldOut(MemoryBatches):
    """Six items, by so many to a batch."""

    def __init__(self, size: int = 2) -> None:
        super().__init__(6)
        self.size = size

    def order(self, epoch: int) -> list[list[int]]:
        wide, square = [0, 2, 4], [1, 3, 5]
        return [part[i : i + self.size] for part in (square, wide) for i in range(0, 3, self.size)]


def validation(
    run: Run, told: list[tuple[int, float]], *, every: Every = TWICE, size: int = 2,
    best: float | None = None, written: list[int] | None = None,
) -> Validation:  # fmt: skip
    return Validation(
        Held(HeldOut(size), every, Path("best")), run.objective, plan=run.plan, team=run.team, weights=nullcontext,
        write_adapter=lambda path, done: (written if written is not None else []).append(done),
        tell=lambda done, loss: told.append((done, loss)), best=best,
    )  # fmt: skip


def test_training_is_the_same_bit_for_bit() -> None:
    network = Network(rank=4, alpha=4, dropout=0.3)
    plain, told = Run(steps=6, network=network).go(), []
    watched = Run(steps=6, network=network)
    watched.go(listeners=[validation(watched, told)])
    assert watched.losses == plain.losses and watched.same_weights(plain)
    assert [done for done, _ in told] == [2, 4, 6] and len({loss for _, loss in told}) == 3
    assert watched.transformer.training


def test_the_loss_is_the_mean_over_items_and_levels_without_dropout() -> None:
    run = Run(steps=2, network=Network(rank=4, alpha=4, dropout=0.5)).go()
    found = validation(run, []).loss()
    assert found == validation(run, []).loss()
    run.transformer.eval()
    expected = []
    for i in range(6):
        latents, reference, txt, vector = (part[None] for part in HeldOut().item(i))
        noise = draw_noise(tuple(latents.shape), "validation", f"item{i}")
        for level in LEVELS:
            x = (1 - level) * latents + level * noise
            expected.append(_error(run, x, noise - latents, level, txt, vector, [reference] if i % 2 else []))
    assert found == pytest.approx(sum(expected) / len(expected), rel=1e-5)


class HalfHidden(HeldOut):
    """The same, of which only the left half counts."""

    def load(self, epoch: int, index: int) -> Batch:
        batch = super().load(epoch, index)
        masks = torch.zeros_like(batch.latents[:, :1])
        masks[..., : masks.shape[-1] // 2] = 1
        return replace(batch, masks=masks)


def test_masks_count_in_validation() -> None:
    run = Run(steps=2).go()
    judge = validation(run, [])
    judge.held = Held(HalfHidden(), TWICE, Path("best"))
    run.transformer.eval()
    expected = []
    for i in range(6):
        latents, reference, txt, vector = (part[None] for part in HeldOut().item(i))
        noise = draw_noise(tuple(latents.shape), "validation", f"item{i}")
        for level in LEVELS:
            x = (1 - level) * latents + level * noise
            references = [reference] if i % 2 else []
            expected.append(_error(run, x, noise - latents, level, txt, vector, references, width=4))
    assert judge.loss() == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def _error(
    run: Run, x: torch.Tensor, target: torch.Tensor, level: float, txt: torch.Tensor, vector: torch.Tensor,
    references: Sequence[torch.Tensor], width: int | None = None,
) -> float:  # fmt: skip
    """Over the first `width` columns."""
    from kontext.denoiser import Conditioning, Denoiser

    with torch.no_grad():
        denoiser = Denoiser(run.transformer, Conditioning(txt, vector, tuple(references), 1.0))
        error = denoiser(x, torch.tensor([level])) - target
        return error[..., :width].square().mean().item()


@pytest.mark.parametrize("size", [1, 3])
def test_batch_size_does_not_matter(size: int) -> None:
    run = Run(steps=1).go()
    assert validation(run, [], size=size).loss() == pytest.approx(validation(run, []).loss(), rel=1e-6)


@pytest.mark.parametrize(("size", "together"), [(2, False), (3, False), (3, True)])
def test_processes_share_the_batches(size: int, together: bool) -> None:
    """Of four batches; with a model that they share, all use it as often."""
    run = Run(steps=1).go()
    whole, parts, passes = validation(run, []).loss(), [], []
    for rank in range(size):
        part = validation(run, [])
        team = {
            "rank": rank,
            "size": size,
            "device": run.team.device,
            "sum": parts.append,
            "together": together,
        }
        part.team = type("Part", (), team)
        passes.append(len(list(part._passes())))
        with pytest.raises(AttributeError):  # what is summed is what this test is after
            part.loss()
    total, count, stopped = sum(parts).tolist()
    assert not stopped
    assert count == 6 * len(LEVELS) and total / count == pytest.approx(whole)
    assert (len(set(passes)) == 1) == (together or size == 2)


def test_the_best_adapter_is_written_when_it_is_better() -> None:
    run, written = Run(steps=5), []
    judge = validation(run, [], every=Every(steps=1), written=written, best=3.0)
    losses = iter([4.0, 2.0, float("nan"), 2.5, 1.0])
    judge.loss = lambda stop: next(losses)  # type: ignore[method-assign]
    run.go(listeners=[judge])
    assert written == [2, 5] and judge.best == 1.0


def test_a_run_that_is_to_end_breaks_it_off_and_makes_up_for_it() -> None:
    run, told, written = Run(steps=2).go(), [], []
    judge, asked = validation(run, told, written=written), []

    def third() -> bool:
        asked.append(None)
        return len(asked) == 3

    judge(Outcome(1, torch.zeros(()), torch.zeros(()), (), ()), third)
    assert judge.broken_off and len(asked) == 3 and not told and not written and judge.best is None
    with pytest.raises(KeyboardInterrupt):
        judge.begin(2, lambda: True)
    judge.begin(2)
    assert told == [(2, validation(run, []).loss())] and written == [2] and not judge.broken_off


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (Every(), [3, 6, 9, 10]),
        (Every(steps=4), [4, 8, 10]),
        (Every(epochs=2), [6, 10]),
        (Every(4, 2), [4, 6, 8, 10]),
    ],
)
def test_when_it_is_due(every: Every, expected: list[int]) -> None:
    plan = Plan(batches=3, accumulation=1, processes=1, steps=10)
    assert [step + 1 for step in range(10) if every.due(step, plan)] == expected
