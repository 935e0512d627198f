from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from kontext.memory.recompute import recompute_blocks
from kontext.training import feed
from kontext.training.ahead import Pass
from kontext.training.network import Network
from kontext.training.state import Progress, load_state, read_progress, save_state
from tests.training.world import SEED, Run, Stop, stop_after

DROPPING = Network(rank=4, alpha=2, dropout=0.2, rank_dropout=0.1, module_dropout=0.1, plus_ratio=4)

RESUMED = {
    "adamw": {},
    "adamw8bit": {"optimizer": "adamw8bit", "network": Network(rank=64, alpha=64)},
    "accumulation": {"accumulation": 2},
    "dropout and schedule": {"network": DROPPING, "schedule": "cosine"},
    "stratified": {"buckets": 5},
    "lion8bit": {"optimizer": "lion8bit", "network": Network(rank=64, alpha=64), "rate": 1e-3},
    "adafactor": {"optimizer": "adafactor"},
    "prodigy": {"optimizer": "prodigy", "rate": 1.0, "schedule": "cosine"},
    "schedule-free": {"optimizer": "adamwschedulefree", "network": DROPPING},
    **{
        kind: {
            "network": Network(rank=4, alpha=2, kind=kind, dropout=0.1, rank_dropout=0.1, module_dropout=0.1)
        }
        for kind in ("dora", "loha", "lokr")
    },
}


def saved(run: Run, folder: Path) -> Path:
    def write(done: int) -> Path:
        progress = Progress(step=done, settings={})
        save_state(folder, progress=progress, parameters=run.parameters, optimizer=run.optimizer)
        return folder

    with pytest.raises(Stop):
        run.go(listeners=[stop_after(3, write)])
    return folder


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    settings = RESUMED[name]
    whole = Run(steps=8, **settings).go()
    folder = saved(Run(steps=8, **settings), tmp_path)

    torch.manual_seed(12345)  # nothing may depend on the global generator
    resumed = Run(steps=8, **settings)
    load_state(folder, parameters=resumed.parameters, optimizer=resumed.optimizer)
    resumed.go(first_step=read_progress(folder).step)

    assert resumed.losses == whole.losses[4:]
    assert resumed.same_weights(whole)


def test_8bit_state_is_really_8bit() -> None:
    run = Run(steps=1, **RESUMED["adamw8bit"]).go()
    states = [state["state1"].dtype for state in run.optimizer.state.values()]
    assert torch.uint8 in states


def test_loss_falls_when_few_items_are_seen_often() -> None:
    run = Run(steps=150, items=2, rate=2e-2, network=Network(rank=16, alpha=16)).go()
    assert sum(run.losses[-20:]) / 20 < 0.4 * run.losses[0]


def test_workers_change_nothing() -> None:
    assert Run(steps=7, workers=2).go().same_weights(Run(steps=7).go())


@pytest.mark.parametrize(("persistent", "expected"), [(True, 1), (False, 2)])
def test_workers_live_through_all_epochs_or_one(
    persistent: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    monkeypatch.setattr(
        feed, "DataLoader", lambda *a, **k: begun.append(k["num_workers"]) or DataLoader(*a, **k)
    )
    run = Run(steps=8, workers=1, persistent=persistent)
    assert run.plan.epochs == 2
    assert run.go().same_weights(Run(steps=8).go())
    assert [workers for workers in begun if workers] == [1] * expected


def test_accumulated_batches_count_by_their_items() -> None:
    """The gradient of a step of two batches is that of the mean over all items in them."""
    run = Run(steps=1, accumulation=2, items=6)
    losses = []
    for index in run.plan.group(0):
        example = run.examples.example(0, index)
        losses.append(run.objective.losses(Pass(example, run.objective.levels(example))))
    assert {len(part) for part in losses} == {1, 2}
    torch.cat(losses).mean().backward()
    expected = {name: parameter.grad.clone() for name, parameter in run.parameters.items()}
    run.optimizer.zero_grad()

    found = {}
    run.updates = type(run.updates)(
        run.parameters,
        _Recorder(run.optimizer, run.parameters, found),
        run.updates.rates,
        0,
        run.updates.scaler,
    )
    run.go()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
    assert run.losses[0] == pytest.approx(torch.cat(losses).mean().item())


class _Recorder:
    """An optimizer that only notes the gradients."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: dict, found: dict) -> None:
        self.param_groups = optimizer.param_groups
        self.parameters, self.found = parameters, found

    def step(self) -> None:
        self.found.update({name: p.grad.clone() for name, p in self.parameters.items()})

    def zero_grad(self, set_to_none: bool) -> None:
        assert set_to_none


def test_a_step_in_which_dropout_skips_every_adapter() -> None:
    """It has nothing to learn from: the momentum of the steps before goes on, and nothing breaks."""
    skipping = Network(
        rank=4, alpha=4, exclude_patterns=(".*",), include_patterns=(r".*linear2",), module_dropout=0.5
    )
    run = Run(steps=12, network=skipping)
    norms: list[float] = []
    run.go(listeners=[lambda outcome: norms.append(outcome.norm.item())])
    assert min(norms) == 0 < max(norms)
    assert len(run.losses) == 12 and all(run.losses)


@pytest.mark.parametrize("offload", [False, True])
def test_recomputing_changes_nothing(offload: bool) -> None:
    plain = Run(steps=4, network=DROPPING).go()
    recomputed = Run(
        steps=4,
        network=DROPPING,
        wrap=lambda model: recompute_blocks(model, "offloaded" if offload else "whole"),
    ).go()
    assert recomputed.same_weights(plain)


def test_clipping_bounds_the_gradient() -> None:
    run = Run(steps=1)
    found: dict[str, torch.Tensor] = {}
    recorder = _Recorder(run.optimizer, run.parameters, found)
    run.updates = type(run.updates)(run.parameters, recorder, run.updates.rates, 1e-3, run.updates.scaler)
    norms = []
    run.go(listeners=[lambda outcome: norms.append(outcome.norm.item())])
    clipped = torch.stack([gradient.norm() for gradient in found.values()]).norm().item()
    assert norms[0] > 1e-3
    assert clipped == pytest.approx(1e-3, rel=1e-3)


def test_the_seed_decides() -> None:
    run, other = Run(steps=2), Run(steps=2)
    other.examples.seed = SEED + 1
    assert not run.go().same_weights(other.go())
