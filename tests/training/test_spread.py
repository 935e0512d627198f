import math

import pytest
import torch

from kontext.timesteps import Timesteps
from kontext.training.spread import picture, rows, spread


def test_uniform_levels_are_spread_evenly() -> None:
    found = spread(Timesteps(sampling="uniform"), {16: 3, 64: 1}, 10)
    torch.testing.assert_close(found.shares, torch.full((10,), 0.1, dtype=torch.float64), rtol=0, atol=1e-3)
    assert found.weights.tolist() == pytest.approx([1.0] * 10, abs=1e-6)


def test_shares_of_sigmoid_follow_the_normal_distribution() -> None:
    """Below t, sigmoid has the share Phi(logit t); t = 0.25 gives logit -ln 3."""
    found = spread(Timesteps(sampling="sigmoid"), {16: 1}, 4)
    below = 0.5 * (1 + math.erf(-math.log(3) / math.sqrt(2)))
    expected = [below, 0.5 - below, 0.5 - below, below]
    assert found.shares.tolist() == pytest.approx(expected, abs=1e-3)


def test_weights_are_the_mean_over_a_range() -> None:
    """sigma_sqrt weights with t^-2: from 0.5 to 1 its mean is 2."""
    found = spread(Timesteps(sampling="uniform", weighting="sigma_sqrt"), {16: 1}, 2)
    assert found.weights[1].item() == pytest.approx(2.0, rel=1e-3)


def test_flux_shift_goes_by_the_sizes() -> None:
    small, large = (spread(Timesteps(), {tokens: 1}, 2).shares[1].item() for tokens in (256, 4096))
    mixed = spread(Timesteps(), {256: 3, 4096: 1}, 2).shares[1].item()
    assert small < large
    assert mixed == pytest.approx(0.75 * small + 0.25 * large, abs=1e-6)


def test_what_is_never_drawn_has_no_bar() -> None:
    found = spread(Timesteps(sampling="uniform", maximum=0.5), {16: 1}, 4)
    table = rows(found)
    assert [row[0] for row in table] == ["0-250", "250-500", "500-750", "750-1000"]
    assert len(table[0][1]) == 40 and table[3] == ("750-1000", "", "0.00%", "-")
    drawn = picture(found)
    assert drawn.getpixel((200, 300)) != (255, 255, 255) and drawn.getpixel((830, 300)) == (255, 255, 255)
