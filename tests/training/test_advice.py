import re

import pytest

from kontext.training.advice import Settings, advice
from kontext.training.network import Kind, Network, build
from kontext.training.schedules import LearningRate
from tests.training.world import SEED, small_transformer


def told(
    *, optimizer: str = "AdamW", rate: float = 1e-4, rank: int = 4, alpha: float | None = None, kind: Kind = "lora",
    schedule: str = "constant", warmup: int = 0,
) -> list[str]:  # fmt: skip
    network = Network(rank, rank if alpha is None else alpha, kind)
    modules = build(small_transformer(), network, seed=SEED)
    rates = [LearningRate(rate, schedule, 100, warmup=warmup)]
    return list(advice(Settings(optimizer, rates, modules)))


@pytest.mark.parametrize(
    "usual",
    [
        {}, {"rate": 5e-3}, {"rate": 1e-6}, {"optimizer": "Prodigy", "rate": 1.0}, {"optimizer": "SGD", "rate": 0.5},
        {"optimizer": "AdamWScheduleFree", "rate": 1e-2, "warmup": 10}, {"rank": 16, "alpha": 1}, {"rank": 32},
        {"rank": 64, "kind": "loha"}, {"rank": 10_000, "alpha": 1, "kind": "lokr"}, {"schedule": "cosine", "warmup": 50},
    ],
)  # fmt: skip
def test_nothing_is_said_of_usual_settings(usual: dict) -> None:
    assert told(**usual) == []


@pytest.mark.parametrize(
    ("useless", "words"),
    [
        ({"rate": 0.05}, "0.05 .* destroys the model with AdamW"),
        ({"rate": 1e-8}, "1e-08 .* AdamW learns next to nothing"),
        ({"optimizer": "Lion8bit", "rate": 5e-3}, "0.005 .* destroys"),
        ({"optimizer": "Prodigy", "rate": 1e-4}, "Prodigy finds the learning rate itself.*0.0001: give 1"),
        (
            {"rank": 33},
            r"rank of 33 is more than 32, the most that double_blocks.0.img_attn.qkv can have, and so for 11 more modules",
        ),
        ({"rank": 12, "alpha": 0.1}, "alpha / rank is 0.00833.*raise --network-alpha"),
        ({"rank": 4, "alpha": 128}, "alpha / rank is 32.*lower --network-alpha"),
        ({"warmup": 100}, "--lr-warmup-steps 100: the run has 100 steps"),
        ({"optimizer": "AdamWScheduleFree", "schedule": "cosine"}, "--lr-scheduler cosine: a schedule-free"),
    ],
)
def test_useless_settings_are_told(useless: dict, words: str) -> None:
    (sentence,) = told(**useless)
    assert re.search(words, sentence), sentence


def test_a_rate_of_the_optimizers_own_is_told() -> None:
    rates = [LearningRate(1.0, "constant", 100)]
    (sentence,) = advice(Settings("Adafactor", rates, {}, relative=True))
    assert "--learning-rate and --lr-scheduler do nothing" in sentence
