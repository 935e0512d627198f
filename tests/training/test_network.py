import pytest

from kontext.errors import UserError
from kontext.lora.dora import DoraLinear
from kontext.lora.products import LokrLinear
from kontext.training.network import Network, build, groups_of, network_of, parameters_of
from tests.training.world import small_transformer


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
