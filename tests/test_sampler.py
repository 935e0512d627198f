"""Samplers against solutions on paper, diffusers' solver and their order of convergence."""

import math

import pytest
import torch

from kontext.flow import schedule
from kontext.sampler import SAMPLERS, dpmpp_2m, euler, heun

X0, SPREAD = torch.tensor([0.7, -1.2]).reshape(1, 2, 1, 1), 0.5
START = torch.tensor([1.5, 0.3]).reshape(1, 2, 1, 1)


def gaussian(x, t):
    """The exact velocity when pictures are N(X0, SPREAD^2): E[n - x_0 | x_t = x]."""
    t = t.reshape(-1, 1, 1, 1).double()
    variance = (1 - t) ** 2 * SPREAD**2 + t**2
    return (t - (1 - t) * SPREAD**2) / variance * (x - (1 - t) * X0) - X0


def exact(x, s, t):
    """Its flow from level s to t: distance from the mean scales with the standard deviation."""
    deviation = [math.sqrt((1 - u) ** 2 * SPREAD**2 + u**2) for u in (s, t)]
    return (1 - t) * X0 + deviation[1] / deviation[0] * (x - (1 - s) * X0)


def error(sampler, steps, begin=0.9, end=0.1):
    sigmas = torch.linspace(begin, end, steps + 1, dtype=torch.float64)
    found = sampler(gaussian, START.double(), sigmas)
    return (found - exact(START.double(), begin, end)).abs().max().item()


@pytest.mark.parametrize("sampler, order", [(euler, 1), (heun, 2), (dpmpp_2m, 2)])
def test_order_of_convergence(sampler, order):
    coarse, fine = error(sampler, 80), error(sampler, 160)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)
    assert error(sampler, 640) < 2e-3


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_straight_paths_are_exact_from_noise_to_picture(sampler):
    """Where the velocity is constant, one step is as good as many; levels 1 and 0 are both included."""
    noise, picture, seen = torch.randn(1, 2, 2, 2), torch.randn(1, 2, 2, 2), []
    found = sampler(lambda x, t: noise - picture, noise, schedule(3, 16), on_step=lambda i, x: seen.append(i))
    torch.testing.assert_close(found, picture)
    assert seen == [0, 1, 2]


def test_heun_is_the_mean_of_two_slopes_but_for_the_last_step():
    """dx/dt = x, levels 1, 0.5, 0: by hand x (1 - 0.5 (1 + 0.5) / 2) = 0.625 x, then Euler's half of it."""
    x = torch.ones(1, 1, 1, 1)
    steps = []
    heun(lambda x, t: x, x, torch.tensor([1.0, 0.5, 0.0]), on_step=lambda i, x: steps.append(x.item()))
    assert steps == [0.625, 0.3125]


def test_dpmpp_2m_is_diffusers():
    from diffusers import DPMSolverMultistepScheduler

    sigmas = 0.97 * schedule(6, 300)  # theirs cannot start at 1
    theirs = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
    )
    theirs.set_timesteps(6)
    theirs.sigmas = sigmas.clone()
    x = START.clone()
    for i, timestep in enumerate(theirs.timesteps):
        velocity = gaussian(x, sigmas[i : i + 1]).float()
        x = theirs.step(velocity, timestep, x).prev_sample
    ours = dpmpp_2m(lambda x, t: gaussian(x, t).float(), START, sigmas)
    assert (ours - x).abs().max() < 1e-5
    assert (ours - euler(gaussian, START.double(), sigmas)).abs().max() > 1e-3


def test_repeated_levels_are_no_step():
    sigmas = torch.tensor([1, 0.8, 0.8, 0.8, 0.4, 0])
    assert torch.isfinite(dpmpp_2m(gaussian, START, sigmas)).all()
