import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from kontext.errors import UserError
from kontext.training.names import STATE, Names
from kontext.training.optimizers import make_optimizer
from kontext.training.state import (
    FILE,
    Progress,
    changed_settings,
    latest_state,
    load_state,
    read_progress,
    save_state,
)


class Odd(torch.optim.SGD):
    """Keeps everything that an optimizer may keep."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, lr=0.25)
        self.param_groups[0]["betas"] = (0.9, 0.999)
        self.param_groups[0]["limit"] = float("inf")
        shared = torch.arange(4)
        self.state[params[0]] = {
            "step": 3,
            "nested": {"a": shared, "b": shared},
            "history": [torch.ones(2), None, True],
        }


def write(folder: Path, step: int = 5, value: float = 1.0, rate: float = 0.1) -> Odd:
    parameter = nn.Parameter(torch.full((2, 3), value))
    optimizer = Odd([parameter])
    progress = Progress(step, {"rate": rate, "names": ["a"]}, {"scale": 2.0}, {"total": 0.5})
    save_state(folder, progress=progress, parameters={"x": parameter}, optimizer=optimizer)
    return optimizer


@pytest.mark.parametrize(
    "name", ["adafactor", "adamw", "adamw8bit", "lion8bit", "prodigy", "adamwschedulefree", "sgd"]
)
def test_an_optimizer_goes_on_with_weights_in_bfloat16(name: str, tmp_path: Path) -> None:
    """Adafactor keeps float32 beside them, which torch would bring down to bfloat16 as it loads it."""

    def begun() -> tuple[nn.Parameter, torch.optim.Optimizer]:
        parameter = nn.Parameter(torch.linspace(-1, 1, 64 * 64).view(64, 64).bfloat16())
        return parameter, make_optimizer(name, [{"params": [parameter], "lr": 1e-2}], arguments={})

    def go(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            noise = torch.Generator().manual_seed(step)
            parameter.grad = torch.randn(64, 64, generator=noise).bfloat16()
            optimizer.step()

    whole, optimizer = begun()
    go(whole, optimizer, range(3))
    save_state(tmp_path, progress=Progress(3, {}), parameters={"x": whole}, optimizer=optimizer)
    resumed, other = begun()
    load_state(tmp_path, parameters={"x": resumed}, optimizer=other)
    go(whole, optimizer, range(3, 8))
    go(resumed, other, range(3, 8))
    assert torch.equal(resumed, whole)
    for key, value in optimizer.state[whole].items():
        assert not isinstance(value, torch.Tensor) or torch.equal(other.state[resumed][key], value), key


def test_round_trip(tmp_path: Path) -> None:
    before = write(tmp_path, value=7.0).state_dict()
    parameter = nn.Parameter(torch.zeros(2, 3))
    after = torch.optim.SGD([parameter], lr=1.0)
    load_state(tmp_path, parameters={"x": parameter}, optimizer=after)
    assert torch.equal(parameter, torch.full((2, 3), 7.0))
    found = after.state_dict()
    assert found["param_groups"][0]["betas"] == (0.9, 0.999)
    assert found["param_groups"][0]["limit"] == float("inf")
    assert found["state"][0]["step"] == 3
    assert found["state"][0]["history"][1:] == [None, True]
    assert torch.equal(found["state"][0]["nested"]["b"].long(), before["state"][0]["nested"]["b"])
    progress = read_progress(tmp_path)
    assert (progress.step, progress.scaler, progress.notes) == (5, {"scale": 2.0}, {"total": 0.5})


def test_nothing_is_pickled(tmp_path: Path) -> None:
    write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    with safe_open(tmp_path / FILE, "pt") as file:
        json.loads(file.metadata()["optimizer"])


def test_what_cannot_be_saved_safely_is_refused(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    optimizer.param_groups[0]["secret"] = object()
    with pytest.raises(UserError, match="keeps a object"):
        save_state(tmp_path, progress=Progress(1, {}), parameters={"x": parameter}, optimizer=optimizer)


def test_the_state_of_another_network_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    parameter = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(UserError, match="another network"):
        load_state(tmp_path, parameters={"x": parameter}, optimizer=torch.optim.SGD([parameter], lr=1.0))


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, None])
def test_broken_states_are_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / FILE).write_bytes(content)
    with pytest.raises(UserError, match="no complete training state"):
        read_progress(tmp_path)


def test_the_furthest_complete_state_of_this_run_is_found(tmp_path: Path) -> None:
    names = Names(tmp_path, "a[1]")
    assert latest_state(names.states()) is None
    write(names.at_step(4, STATE), 4)
    write(names.at_epoch(3, STATE), 9)
    write(names.at_step(12, STATE), 12)
    torn = names.at_step(12, STATE) / FILE
    torn.write_bytes(torn.read_bytes()[:-5])
    write(Names(tmp_path, "a[1]-other").at_step(50, STATE), 50)
    assert latest_state(names.states()) == names.at_epoch(3, STATE)


def test_states_of_an_earlier_run_of_the_name_do_not_count(tmp_path: Path) -> None:
    """It had other settings and came further; copying has mixed the times of those of the last one up."""
    names = Names(tmp_path, "a")
    for order, (step, rate) in enumerate([(12, 0.1), (40, 0.1), (8, 0.2), (4, 0.2)]):
        write(names.at_step(step, STATE), step, rate=rate)
        os.utime(names.at_step(step, STATE) / FILE, (1000 + order, 1000 + order))
    write(names.final(STATE), 50)
    os.utime(names.final(STATE) / FILE, (1000, 1000))
    assert latest_state(names.states()) == names.at_step(8, STATE)


def test_changed_settings_survive_json() -> None:
    assert changed_settings({"a": [1, 2], "b": 1}, {"a": (1, 2), "b": 2}) == {"b": (1, 2)}
    assert changed_settings({}, {"new": 1}) == {"new": (None, 1)}
