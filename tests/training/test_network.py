import pytest
import torch

from kontext.errors import UserError
from kontext.lora.dora import DoraLinear
from kontext.lora.products import LokrLinear
from kontext.training.arguments import parse_arguments
from kontext.training.network import Network, build, groups_of, network_of, parameters_of
from tests.training.world import Run, small_transformer


@pytest.mark.parametrize("value", [True, "true", 1, "True"])
@pytest.mark.parametrize("key", ["dora", "dora_wd"])
def test_dora_is_asked_for_among_the_arguments(key: str, value: object) -> None:
    assert network_of(4, None, 0.0, {key: value}).kind == "dora"
    assert network_of(4, None, 0.0, {key: False}).kind == "lora"
    modules = build(small_transformer(), network_of(4, None, 0.0, {key: value}), seed=0)
    assert {type(module) for module in modules.values()} == {DoraLinear}


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        ("lora", {"factor": 4}, "factor is for --network-module lokr"),
        ("lokr", {"factor": 0}, "whole number above 0, or -1"),
        ("loha", {"dora": True}, "dora is for --network-module lora"),
        ("lora", {"dora": "maybe"}, "must be true or false"),
    ],
)
def test_arguments_that_do_not_fit(kind: str, arguments: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        network_of(4, None, 0.0, arguments, kind)


def test_settings_reach_every_linear() -> None:
    network = network_of(2, 1.0, 0.1, {"factor": 2, "rank_dropout": 0.2, "module_dropout": 0.3}, "lokr")
    for module in build(small_transformer(), network, seed=0).values():
        assert isinstance(module, LokrLinear) and module.rows[0] == module.columns[0] == 2
        assert (module.dropout, module.rank_dropout, module.module_dropout) == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("kind", "second"),
    [("lora", "lora_up.weight"), ("dora", "lora_up.weight"), ("loha", "hada_w2_a"), ("lokr", "lokr_w2_b")],
)
def test_lora_plus_is_for_the_factor_that_starts_at_zero(kind: str, second: str) -> None:
    modules = build(small_transformer(), Network(1, 1.0, kind=kind), seed=0)
    parameters = parameters_of(modules)
    slow, fast = groups_of(parameters, rate=1.0, plus_ratio=4)
    chosen = {name for name, p in parameters.items() if any(p is q for q in fast["params"])}
    assert chosen == {f"{name}.{second}" for name in modules}
    assert all(not parameters[name].any() for name in chosen)
    assert len(slow["params"]) + len(fast["params"]) == len(parameters)


@pytest.mark.parametrize(
    "words",
    [
        [r"rank_patterns=['double_blocks\..*mlp.*=2', 'double_blocks.*=8']"],
        [r"rank_patterns={'double_blocks\\..*mlp.*': 2, 'double_blocks.*': 8}"],
    ],
)
def test_ranks_by_pattern(words: list[str]) -> None:
    """The first pattern that matches counts, what is excluded stays so, and all act with one strength."""
    arguments = parse_arguments([*words, "exclude_patterns=.*txt_mlp.*"], "--network-args")
    modules = build(small_transformer(), network_of(4, 1.0, 0.0, arguments), seed=0)
    assert {module.rank for name, module in modules.items() if "img_mlp" in name} == {2}
    assert {module.rank for name, module in modules.items() if "attn" in name} == {8}
    assert {module.rank for name, module in modules.items() if "single" in name} == {4}
    assert {module.scale for module in modules.values()} == {0.25}
    assert not any("txt_mlp" in name for name in modules)
    assert all(module.lora_down.weight.shape[0] == module.rank for module in modules.values())


def test_one_pattern_needs_no_list() -> None:
    arguments = parse_arguments([r"rank_patterns=single_blocks\..*=3", "lr_patterns=.*linear1=2e-3"], "--x")
    network = network_of(4, None, 0.0, arguments)
    assert network.rank_patterns == ((r"single_blocks\..*", 3),)
    assert network.rate_patterns == ((".*linear1", 2e-3),)


@pytest.mark.parametrize(
    "arguments",
    [
        {"rank_patterns": "a"}, {"rank_patterns": "a=0"}, {"rank_patterns": "a=1.5"}, {"rank_patterns": 3},
        {"lr_patterns": "a=-1"}, {"lr_patterns": "a=b"}, {"lr_patterns": ["a=1", 2]},
    ],
)  # fmt: skip
def test_patterns_of_no_form_are_refused(arguments: dict) -> None:
    with pytest.raises(UserError, match="--network-args: .*_patterns"):
        network_of(4, None, 0.0, arguments)


def test_a_pattern_that_matches_nothing_is_told() -> None:
    with pytest.raises(UserError, match="'double' in rank_patterns matches no trained module"):
        build(small_transformer(), Network(4, 4, rank_patterns=(("double", 2),)), seed=0)
    parameters = parameters_of(build(small_transformer(), Network(4, 4), seed=0))
    with pytest.raises(UserError, match="in lr_patterns matches no"):
        groups_of(parameters, rate=1.0, plus_ratio=1, patterns=[("double", 2.0)])


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_rates_by_pattern(kind: str) -> None:
    """Every parameter is in one group, at the rate of its module, times the ratio of LoRA+."""
    parameters = parameters_of(build(small_transformer(), Network(1, 1.0, kind=kind), seed=0))
    patterns = [(r".*linear1", 3.0), (r"single_blocks\..*", 5.0)]
    groups = groups_of(parameters, rate=1.0, plus_ratio=7, patterns=patterns)
    found = {
        name: [g["lr"] for g in groups if any(p is q for q in g["params"])] for name, p in parameters.items()
    }
    zeros = {name for name, p in parameters.items() if not p.any()}
    for name, rates in found.items():
        own = 3.0 if "linear1" in name else 5.0 if "single" in name else 1.0
        assert rates == [own * 7 if name in zeros else own], name


def test_rates_by_pattern_have_their_effect() -> None:
    """After one step of AdamW, weights have moved by their learning rate."""
    run = Run(steps=1, rate=1e-2)
    before = run.weights()
    groups = groups_of(run.parameters, rate=1e-2, plus_ratio=1, patterns=[(r".*linear2", 1e-4)])
    assert [len(group["params"]) for group in groups] == [20, 4]
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    for parameter in run.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, weight in run.weights().items():
        moved = (weight - before[name]).abs().mean().item()
        assert moved == pytest.approx(1e-4 if "linear2" in name else 1e-2, rel=0.01), name
