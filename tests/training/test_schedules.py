import pytest
import torch
from transformers import get_scheduler

from kontext.training.schedules import LearningRate

TOTAL, WARMUP, PEAK = 40, 5, 2e-4

CASES = {
    "constant_with_warmup": ({}, {}),
    "linear": ({}, {}),
    "cosine": ({}, {}),
    "cosine_with_restarts": ({"cycles": 3}, {"num_cycles": 3}),
    "polynomial": ({"power": 2.0}, {"power": 2.0}),
    "inverse_sqrt": ({"timescale": 12}, {"timescale": 12}),
    "cosine_with_min_lr": ({"min_ratio": 0.1}, {"min_lr_rate": 0.1}),
    "warmup_stable_decay": ({"min_ratio": 0.2, "decay": 10}, {"min_lr_ratio": 0.2, "num_decay_steps": 10}),
}


@pytest.mark.parametrize("name", CASES)
def test_rates_are_those_of_transformers(name: str) -> None:
    ours, theirs = CASES[name]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=WARMUP, num_training_steps=TOTAL, scheduler_specific_kwargs=theirs
    )
    rate = LearningRate(PEAK, name, TOTAL, warmup=WARMUP, **ours)
    for step in range(TOTAL + 3):
        warming = name == "warmup_stable_decay" and step < WARMUP  # theirs starts at its floor, not at 0
        expected = scheduler.get_last_lr()[0]
        assert warming or PEAK * rate.factor(step) == pytest.approx(expected, rel=1e-9, abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_constant_may_warm_up() -> None:
    rate = LearningRate(PEAK, "constant", TOTAL, warmup=4)
    assert [rate.factor(step) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]


def test_rex_by_hand() -> None:
    rate = LearningRate(PEAK, "rex", 10)
    # left / (0.1 + 0.9 left)
    assert rate.factor(0) == pytest.approx(1)
    assert rate.factor(5) == pytest.approx(0.5 / 0.55)
    assert rate.factor(9) == pytest.approx(0.1 / 0.19)
    assert rate.factor(10) == 0
