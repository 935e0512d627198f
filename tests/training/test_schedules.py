import pytest
import torch
from transformers import get_scheduler

from kontext.errors import UserError
from kontext.training.schedules import LearningRate, adjusted, followed

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


ARGUMENTS = [
    ("cosine", {"num_cycles": 1.25}),
    ("cosine_with_restarts", {"num_cycles": 2}),
    ("polynomial", {"power": 3, "lr_end": 1e-5}),
    ("inverse_sqrt", {"timescale": 7}),
    ("cosine_with_min_lr", {"min_lr": 5e-5}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.3, "num_cycles": 0.75}),
    ("warmup_stable_decay", {"num_decay_steps": 12, "min_lr_ratio": 0.1, "decay_type": "linear"}),
    ("warmup_stable_decay", {"num_decay_steps": 12, "decay_type": "1-sqrt"}),
]


@pytest.mark.parametrize(("name", "arguments"), ARGUMENTS)
def test_arguments_mean_what_they_mean_in_transformers(name: str, arguments: dict) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=0, num_training_steps=TOTAL, scheduler_specific_kwargs=arguments
    )
    rate = adjusted(LearningRate(PEAK, name, TOTAL), arguments)
    for step in range(TOTAL):
        assert PEAK * rate.factor(step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9, abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_arguments_bend_rex() -> None:
    rate = adjusted(LearningRate(PEAK, "rex", 10), {"d": 0.5, "min_lr_ratio": 0.2})
    assert rate.factor(5) == pytest.approx(0.2 + 0.8 * 0.5 / 0.75)


@pytest.mark.parametrize(
    ("schedule", "arguments", "words"),
    [
        ("cosine", {"power": 2}, "cosine has no argument power; it has num_cycles"),
        ("linear", {"power": 2}, "it has none"),
        ("polynomial", {"power": "two"}, "power of polynomial cannot be 'two'"),
        (
            "warmup_stable_decay",
            {"decay_type": "steep"},
            "decay_type of warmup_stable_decay cannot be 'steep'",
        ),
    ],
)
def test_wrong_arguments_are_named(schedule: str, arguments: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        adjusted(LearningRate(PEAK, schedule, TOTAL), arguments)


def test_a_scheduler_of_torch_begins_after_the_warmup() -> None:
    rate = LearningRate(PEAK, "constant", TOTAL, warmup=WARMUP)
    arguments = {"step_size": 10, "gamma": 0.5}
    short = followed(rate, "StepLR", arguments)
    rate = followed(rate, "torch.optim.lr_scheduler.StepLR", arguments)
    assert short.factors == rate.factors
    factors = [rate.factor(step) for step in range(TOTAL + 3)]
    assert factors[:WARMUP] == [step / WARMUP for step in range(WARMUP)]
    assert factors[WARMUP:] == pytest.approx(
        [0.5 ** ((step - WARMUP) // 10) for step in range(WARMUP, TOTAL)] + 3 * [0.125]
    )


@pytest.mark.parametrize(
    ("path", "arguments", "words"),
    [
        ("torch.optim.lr_scheduler.StepLR", {"gama": 1}, "unexpected keyword argument 'gama'"),
        (
            "torch.optim.lr_scheduler.ReduceLROnPlateau",
            {},
            "missing 1 required positional argument: 'metrics'",
        ),
        ("torch.optim.AdamW", {}, "is not a torch learning rate scheduler"),
        ("nowhere", {}, "it is module.Class"),
    ],
)
def test_what_is_no_scheduler_of_steps_is_refused(path: str, arguments: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        followed(LearningRate(PEAK, "constant", TOTAL), path, arguments)


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
