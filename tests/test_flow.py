"""Schedules against diffusers, ComfyUI's definitions written out, and distributions known on paper."""

import math

import pytest
import torch

from kontext.flow import LEVELS, beta_quantile, schedule


@pytest.mark.parametrize("steps, tokens", [(1, 16), (8, 300), (25, 4096)])
def test_flux_is_diffusers(steps, tokens):
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift

    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    sigmas = torch.linspace(1, 1 / steps, steps).numpy()
    theirs.set_timesteps(sigmas=sigmas, mu=calculate_shift(tokens, 256, 4096, 0.5, 1.15))
    torch.testing.assert_close(schedule(steps, tokens), theirs.sigmas, atol=2e-6, rtol=0)


def table(s):
    return [s / (s + 10_000 / i - 1) for i in range(1, 10_001)]


@pytest.mark.parametrize("steps", [1, 3, 7, 20, 33])
def test_simple_takes_every_nth_entry_of_the_table_from_its_end(steps):
    entries = table(math.exp(1.15))
    expected = [entries[-1 - int(i * (10_000 / steps))] for i in range(steps)] + [0]
    torch.testing.assert_close(schedule(steps, 77, kind="simple"), torch.tensor(expected))


def test_the_middle_of_beta_is_the_entry_that_numpy_rounds_to():
    """rint(0.5 * 9999) is 5000, so entry 5001 of 10000; a flow shift of 1 shifts nothing."""
    assert schedule(2, 77, kind="beta", flow_shift=1.0).tolist() == pytest.approx([1, 0.5001, 0], abs=1e-7)


def test_quantiles_known_on_paper():
    """Beta(1/2, 1/2) is the arcsine distribution, Beta(1, 1) is uniform."""
    p = torch.linspace(0, 1, 41, dtype=torch.float64)
    torch.testing.assert_close(beta_quantile(p, 0.5), torch.sin(math.pi / 2 * p) ** 2, atol=1e-12, rtol=0)
    torch.testing.assert_close(beta_quantile(p, 1.0), p, atol=1e-12, rtol=0)


def counted_quantile(p):
    """Beta(0.6, 0.6), summed up in a million slices of u = x^0.6, where its density is smooth at 0."""
    u = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1e6 * 0.5**0.6
    cumulative = torch.cumsum((1 - u ** (1 / 0.6)) ** -0.4, 0)
    cumulative /= 2 * cumulative[-1].item()
    x = u[torch.searchsorted(cumulative, min(p, 1 - p)).clamp(max=len(u) - 1)].item() ** (1 / 0.6)
    return x if p <= 0.5 else 1 - x


@pytest.mark.parametrize("steps", [1, 7, 21])
def test_beta_is_the_tables_entries_at_its_quantiles(steps):
    entries = table(2.0)
    expected = [entries[round(counted_quantile(1 - i / steps) * 9999)] for i in range(steps)] + [0]
    found = schedule(steps, 77, kind="beta", flow_shift=2.0)
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("steps", [1, 2, 25, 500])
def test_every_schedule_falls_from_1_to_0(kind, steps):
    sigmas = schedule(steps, 1024, kind=kind)
    assert sigmas.shape == (steps + 1,) and sigmas[0] == 1 and sigmas[-1] == 0
    assert (sigmas.diff() <= 0).all()
