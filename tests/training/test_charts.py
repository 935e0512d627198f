"""What charts draw of many values, and the numbers at their edges."""

import numpy as np
import pytest

from kontext.training.charts import short, thin, ticks


@pytest.mark.parametrize("count", (101, 999, 1000, 12_345))
def test_short_peaks_and_both_ends_are_drawn(count: int) -> None:
    values = np.random.default_rng(0).normal(size=count)
    values[count // 3], values[count // 2] = 100, -100
    kept = thin(values, limit=100)
    assert {0, count // 3, count // 2, count - 1} <= set(kept)
    assert len(kept) <= 102
    assert (np.diff(kept) > 0).all() and np.diff(kept).max() <= 2 * -(-count // 50)


def test_few_values_are_all_drawn() -> None:
    assert thin(np.zeros(700)).tolist() == list(range(700))
    assert thin(np.array([3.0, np.nan, 1.0]), limit=3).tolist() == [0, 1, 2]


def test_missing_values_hide_no_peak() -> None:
    values = np.full(1000, np.nan)
    values[437] = 5
    assert 437 in thin(values, limit=100)


@pytest.mark.parametrize(
    "low, high, expected",
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 3e-4, [0, 1e-4, 2e-4, 3e-4]), (1, 1600, [500, 1000, 1500])],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, 5) == pytest.approx(expected)


def test_numbers_as_people_read_them() -> None:
    values = (0, 0.25, 1234567, 0.0001, 2.345e-5, 12000, 0.123456)
    assert [short(value) for value in values] == [
        "0",
        "0.25",
        "1.23e6",
        "1e-4",
        "2.35e-5",
        "12,000",
        "0.1235",
    ]
