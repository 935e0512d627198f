"""What is chosen for cards of several sizes, by the numbers of the published model."""

from dataclasses import replace

import pytest

from kontext.memory.choice import (
    POLICIES,
    Setup,
    choose,
    operations,
    picture_time,
    possible_swaps,
    setups,
    step_time,
)
from kontext.memory.estimate import Estimate, Policy, Work, denoising, training
from kontext.memory.placement import Placement
from kontext.memory.streaming import streamed_blocks
from kontext.memory.weights import weights_of
from kontext.model.transformer import FLUX
from tests.memory.test_estimate import MEGAPIXEL, RANK_32

WEIGHTS = weights_of(FLUX, itemsize=2)


def peak(setup: Setup, work: Work = MEGAPIXEL) -> int:
    placed = WEIGHTS.placed(setup.placement)
    return Estimate((training(WEIGHTS, placed, RANK_32, work, [setup.policy] * 57, ahead=32),)).peak


def trained_on(
    gigabytes: float, work: Work = MEGAPIXEL, policies: tuple[Policy, ...] = POLICIES
) -> Setup | None:
    return choose(
        setups(FLUX, policies=policies),
        peak=lambda setup: peak(setup, work),
        time=step_time(WEIGHTS, work),
        budget=int(gigabytes * 1e9),
    ).setup


def test_operations_of_the_published_model():
    """112.4 and 53.1 TFLOP at 8704 tokens, counted by hand: 57 blocks x 12 D^2 and 57 x 2 L^2 D multiplications."""
    linear, attention = operations(FLUX, MEGAPIXEL)
    assert linear == 57 * 8704 * 12 * 3072**2 * 2
    assert attention == 57 * 2 * 8704**2 * 3072 * 2
    assert (linear / 1e12, attention / 1e12) == (pytest.approx(112.4, abs=0.1), pytest.approx(53.1, abs=0.1))


def test_a_large_card_keeps_everything():
    assert trained_on(80) == Setup(Placement(), "none")


def test_the_smallest_cards_offload():
    """At 8704 tokens copies are hidden, so blocks are streamed before anything is computed again."""
    small = trained_on(5)
    assert small is not None and small.policy == "offloaded" and small.placement.swap != 0
    assert trained_on(3.5) is None


def test_less_memory_never_means_less_work():
    time = step_time(WEIGHTS, MEGAPIXEL)
    chosen = [trained_on(size) for size in (5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 80)]
    times = [time(setup)[0] for setup in chosen]
    assert times == sorted(times, reverse=True)
    assert all(
        peak(setup) <= size * 1e9 for setup, size in zip(chosen, (5, 6, 8, 10, 12, 16, 20, 24), strict=False)
    )


def test_with_few_tokens_computing_again_beats_copying():
    """8704 tokens hide the copies of most blocks, 1100 hide few: there memory is won by computing again instead."""

    def streamed(setup: Setup | None) -> int:
        assert setup is not None
        return sum(map(len, streamed_blocks(19, 38, setup.placement.swap)))

    many, few = trained_on(16), trained_on(16, Work(batch=1, tokens=1100, itemsize=2))
    assert many.policy == "selective" and few.policy == "whole"
    assert streamed(many) > 2 * streamed(few)


def test_of_equals_the_one_with_the_fewest_blocks_on_the_host():
    found = trained_on(12, policies=("whole",))
    fewer = possible_swaps(FLUX)[possible_swaps(FLUX).index(found.placement.swap) - 1]
    assert peak(found) <= 12e9 < peak(replace(found, placement=Placement(fewer, found.placement.modulation)))


def test_possible_swaps_stream_more_and_more_blocks_until_all():
    counts = [sum(map(len, streamed_blocks(19, 38, swap))) for swap in possible_swaps(FLUX)]
    assert counts[0] == 0 and counts[-1] == 57
    assert counts == sorted(set(counts))
    assert possible_swaps(replace(FLUX, double_blocks=1, single_blocks=1)) == [
        0,
        1,
        "max",
    ]  # 1 is the single block


def test_the_smallest_budget_is_told():
    found = choose(
        setups(FLUX, policies=POLICIES), peak=peak, time=step_time(WEIGHTS, MEGAPIXEL), budget=10**9
    )
    assert found.setup is None
    assert found.smallest == min(peak(setup) for setup in setups(FLUX, policies=POLICIES))
    assert peak(Setup(Placement("max", True), "offloaded")) == found.smallest


@pytest.mark.parametrize(
    ("gigabytes", "expected"), [(48, Placement()), (24, Placement(0, True)), (2.8, Placement("max", True))]
)
def test_pictures(gigabytes, expected):
    found = choose(
        setups(FLUX),
        peak=lambda setup: (
            Estimate((denoising(WEIGHTS, WEIGHTS.placed(setup.placement), MEGAPIXEL, steps=25),)).peak
        ),
        time=picture_time(WEIGHTS, MEGAPIXEL),
        budget=int(gigabytes * 1e9),
    )
    assert found.setup is not None and found.setup.placement == expected
