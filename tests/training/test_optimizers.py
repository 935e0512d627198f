import sys

import pytest
import torch
from torch import nn

from kontext.errors import UserError
from kontext.training.arguments import parse_arguments
from kontext.training.loop import Outcome
from kontext.training.network import Network, groups_of, network_of
from kontext.training.optimizers import class_of, evaluation_weights, make_optimizer
from tests.training.world import Run


def groups() -> list[dict]:
    return [{"params": [nn.Parameter(torch.ones(3))], "lr": 0.1}]


def test_arguments_are_values() -> None:
    words = [
        "betas=0.9,0.95",
        "weight_decay=1e-2",
        "fused=None",
        "decouple=True",
        "include=(?=a).*=b",
        "names=['x']",
    ]
    assert parse_arguments(words, "--x") == {
        "betas": (0.9, 0.95), "weight_decay": 0.01, "fused": None, "decouple": True, "include": "(?=a).*=b",
        "names": ["x"],
    }  # fmt: skip


@pytest.mark.filterwarnings("error")
def test_regexes_in_a_list_are_read_without_remarks() -> None:
    words = [r"exclude_patterns=['.*\.0\..*', 'a']"]
    assert parse_arguments(words, "--x") == {"exclude_patterns": [r".*\.0\..*", "a"]}


@pytest.mark.parametrize("words", [["a"], ["=1"], ["a=1", "a=2"]])
def test_bad_arguments(words: list[str]) -> None:
    with pytest.raises(UserError, match="--optimizer-args"):
        parse_arguments(words, "--optimizer-args")


def test_arguments_reach_the_optimizer() -> None:
    optimizer = make_optimizer("AdamW", groups(), arguments={"weight_decay": 0.5, "betas": (0.5, 0.6)})
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.6)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_names() -> None:
    import bitsandbytes

    assert class_of("AdamW8bit")[0] is bitsandbytes.optim.AdamW8bit
    assert class_of("paged_adamw_8bit")[0] is bitsandbytes.optim.PagedAdamW8bit
    assert class_of("torch.optim.RMSprop")[0] is class_of("RMSprop")[0] is torch.optim.RMSprop


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adamx", "not known. Use one of adamw"),
        ("torch.optim.Nothing", "cannot be imported"),
        ("no_such_package.Thing", "cannot be imported"),
        ("torch.nn.Linear", "not a torch optimizer"),
    ],
)
def test_unknown_names_are_refused(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        class_of(name)


def test_the_learning_rate_is_no_argument() -> None:
    with pytest.raises(UserError, match="lr is --learning-rate"):
        make_optimizer("adamw", groups(), arguments={"lr": 0.5})


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(UserError, match="pip install prodigyopt"):
        class_of("prodigy")


def test_unknown_arguments_are_refused_with_those_known() -> None:
    with pytest.raises(UserError, match="weight_decay"):
        make_optimizer("adamw", groups(), arguments={"weight_decoy": 1})


@pytest.mark.parametrize(("name", "rate"), [("prodigy", 1.0), ("adamwschedulefree", 2e-2)])
def test_optimizers_of_other_packages_train(name: str, rate: float) -> None:
    run = Run(steps=150, items=2, optimizer=name, rate=rate, network=Network(rank=16, alpha=16)).go()
    assert sum(run.losses[-20:]) / 20 < 0.5 * run.losses[0]


def test_prodigy_finds_a_rate() -> None:
    run = Run(steps=60, items=2, optimizer="prodigy", rate=1.0).go()
    assert run.optimizer.param_groups[0]["d"] > 100 * run.optimizer.param_groups[0]["d0"]


def test_the_rates_that_are_told_of_prodigy_are_those_that_act() -> None:
    """Its own one as it is when a step begins, times that of the schedule."""
    run = Run(steps=12, optimizer="prodigy", rate=2.0, schedule="cosine")
    (group,) = run.optimizer.param_groups
    told, own = [], [group["d"]]

    def listen(outcome: Outcome) -> None:
        told.append(outcome.rates)
        own.append(group["d"])

    run.go(listeners=[listen])
    (rate,) = run.updates.rates
    assert told == [(2.0 * rate.factor(step) * d,) for step, d in enumerate(own[:-1])]
    assert own[-1] > own[0] == 1e-6


def test_prodigy_with_several_rates_is_refused() -> None:
    several = [*groups(), {"params": [nn.Parameter(torch.ones(3))], "lr": 0.2}]
    with pytest.raises(UserError, match="one learning rate for all"):
        make_optimizer("prodigy", several, arguments={})


def test_a_schedule_free_average_is_what_is_used() -> None:
    """x = (y - (1 - beta) z) / beta, by the paper's y = (1 - beta) z + beta x (Defazio et al. 2024); y is trained."""
    run = Run(steps=9, optimizer="adamwschedulefree", rate=1e-2).go()
    trained = run.weights()
    expected = {
        name: (trained[name] - 0.1 * run.optimizer.state[parameter]["z"]) / 0.9
        for name, parameter in run.parameters.items()
    }
    with evaluation_weights(run.optimizer, list(run.parameters.values())):
        for name, value in run.weights().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    assert all(torch.equal(value, trained[name]) for name, value in run.weights().items())
    assert any(not torch.allclose(expected[name], trained[name]) for name in trained)


class TwoFaced(torch.optim.SGD):
    """As schedule-free optimizers do: other weights for use than for training, by inexact arithmetic."""

    def train(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(1 / 3)

    def eval(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(3)


def test_weights_for_use_come_and_go_without_a_trace() -> None:
    parameter = nn.Parameter(torch.randn(100, generator=torch.Generator().manual_seed(0)))
    optimizer = TwoFaced([parameter], lr=0.1)
    before = parameter.detach().clone()
    with evaluation_weights(optimizer, [parameter]):
        assert torch.equal(parameter, before * 3)
    assert torch.equal(parameter, before)
    assert not torch.equal(before * 3 * (1 / 3), before)  # or the test would prove nothing


def test_lora_plus_gives_the_second_factor_its_own_rate() -> None:
    network = network_of(4, None, 0.0, {"loraplus_lr_ratio": 16, "exclude_patterns": ".*mlp.*"})
    assert (network.alpha, network.plus_ratio, network.exclude_patterns) == (4, 16.0, (".*mlp.*",))
    parameters = {
        "a.lora_down.weight": nn.Parameter(torch.zeros(1)),
        "a.lora_up.weight": nn.Parameter(torch.ones(1)),
    }
    down, up = groups_of(parameters, rate=1e-3, plus_ratio=16)
    assert (down["lr"], up["lr"]) == (1e-3, 16e-3)
    assert up["params"] == [parameters["a.lora_up.weight"]]


@pytest.mark.parametrize("arguments", [{"convdim": 4}, {"rank_dropout": 2}, {"include_patterns": 3}])
def test_bad_network_arguments(arguments: dict) -> None:
    with pytest.raises(UserError, match="--network-args"):
        network_of(4, None, 0.0, arguments)
