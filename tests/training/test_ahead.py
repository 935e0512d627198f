"""Modulation of many training steps at once: the same digits, and each weight visits the device once a window."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kontext.memory.modulation import HostModulation, has_host_modulation, offload_modulation
from kontext.memory.recompute import recompute_blocks
from kontext.memory.streaming import stream_blocks
from kontext.training import ahead
from kontext.training.network import Network
from kontext.training.state import load_state
from tests.training.test_loop import saved
from tests.training.test_validation import validation
from tests.training.world import Run

CPU = torch.device("cpu")
NETWORK = Network(rank=4, alpha=4, dropout=0.2)
MODULATIONS = 2 + 2  # of one double block and two single ones


def off(model):
    offload_modulation(model, CPU)


def with_everything(model):
    offload_modulation(model, CPU)
    stream_blocks(model, "max", CPU)
    recompute_blocks(model)


@pytest.fixture
def window(monkeypatch):
    monkeypatch.setattr(ahead, "WINDOW", 5)


@pytest.fixture
def reads(monkeypatch):
    """How many vectors each visit of a modulation's weights was for, by modulation."""
    found = {}
    forward = HostModulation.forward

    def count(self, vecs):
        found.setdefault(self, []).append(sum(map(len, vecs)))
        return forward(self, vecs)

    monkeypatch.setattr(HostModulation, "forward", count)
    return found


@pytest.mark.parametrize("wrap", [off, with_everything])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_same_weights_as_step_by_step(window, reads, accumulation, wrap):
    settings = {"steps": 7, "network": NETWORK, "accumulation": accumulation, "buckets": 5}
    plain = Run(**settings).go()
    windowed = Run(**settings, wrap=wrap).go()
    assert windowed.losses == plain.losses and windowed.same_weights(plain)
    # Batches of two and of one item share windows of five items, or six when the last batch does not fit.
    sizes = Counter(size for size in next(iter(reads.values()))[:-1])
    assert len(reads) == MODULATIONS and set(sizes) <= {5, 6}
    assert all(visits == next(iter(reads.values())) for visits in reads.values())


def test_a_resumed_run_is_the_uninterrupted_one(window, tmp_path: Path):
    settings = {"steps": 8, "network": NETWORK}
    whole = Run(**settings).go()
    folder = saved(Run(**settings, wrap=off), tmp_path)
    resumed = Run(**settings, wrap=off)
    load_state(folder, parameters=resumed.parameters, optimizer=resumed.optimizer)
    resumed.go(first_step=4)  # other windows than those of the whole run
    assert resumed.losses == whole.losses[4:] and resumed.same_weights(whole)


def test_validation_computes_all_levels_of_its_items_together(reads):
    run, plain = Run(steps=1, wrap=off), Run(steps=1)
    assert validation(run, []).loss() == validation(plain, []).loss()
    # Six items at four levels make 24 passes, fewer than a window of 32.
    assert list(reads.values()) == [[24]] * MODULATIONS


def test_guidance_and_pooled_text_count(window):
    """Other modulations than those of the pass would show: the vectors differ from item to item, and with guidance."""
    run, plain = Run(steps=4, wrap=off), Run(steps=4)
    run.objective, plain.objective = (replace(each.objective, guidance=3.5) for each in (run, plain))
    assert run.go().losses == plain.go().losses != Run(steps=4).go().losses


@pytest.mark.parametrize("pattern", [r"double_blocks.0.img_mod.lin", r"vector_in.in_layer"])
def test_what_training_changes_is_computed_at_every_step(pattern, reads):
    network = Network(rank=4, alpha=4, include_patterns=(pattern,))
    plain, run = Run(steps=3, network=network).go(), Run(steps=3, network=network, wrap=off)
    assert any("mod" in name or "vector" in name for name in run.modules)
    assert not has_host_modulation(run.transformer)
    assert run.go().same_weights(plain) and not reads


def test_examples_are_taken_one_by_one_after_the_first_window(window):
    """Loading stays in step with training: it need not deliver a window's batches at once."""
    run, taken = Run(steps=12, wrap=off), []
    example = run.examples.example
    run.examples.example = lambda *place: taken.append(place) or example(*place)
    counts = []
    run.go(listeners=[lambda outcome: counts.append(len(taken))])
    steps = [after - before for before, after in zip(counts, counts[1:], strict=False)]
    assert counts[0] <= 5 and max(steps) <= 2
