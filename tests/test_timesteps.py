import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from kontext.errors import UserError
from kontext.timesteps import Timesteps, levels, loss_weights, stratified

TOKENS = 1024
MU = 0.5 + 0.65 * (TOKENS - 256) / 3840


def grid(count: int = 200_001) -> Tensor:
    """Evenly spread u: levels of it are the distribution itself, without sampling noise."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def share_below(settings: Timesteps, t: float) -> float:
    return (levels(settings, grid(), TOKENS) < t).double().mean().item()


def normal_cdf(x: float) -> float:
    return NormalDist().cdf(x)


def logit(t: float) -> float:
    return math.log(t / (1 - t))


def unshift(t: float, s: float) -> float:
    return t / (s - (s - 1) * t)


CLOSED_FORMS = {
    "uniform": (Timesteps("uniform"), lambda t: t),
    "sigmoid": (Timesteps("sigmoid", sigmoid_scale=1.5), lambda t: normal_cdf(logit(t) / 1.5)),
    "shift": (
        Timesteps("shift", flow_shift=3.0, sigmoid_scale=0.8),
        lambda t: normal_cdf(logit(unshift(t, 3.0)) / 0.8),
    ),
    # the shift by exp(mu) adds mu to the logit
    "flux_shift": (Timesteps("flux_shift"), lambda t: normal_cdf(logit(t) - MU)),
    # lambda = -2 logit(t) is normal(1.2, 0.7); t below t0 means lambda above lambda0
    "logsnr": (
        Timesteps("logsnr", logit_mean=1.2, logit_std=0.7),
        lambda t: 1 - normal_cdf((-2 * logit(t) - 1.2) / 0.7),
    ),
    "qinglong_flux": (
        Timesteps("qinglong_flux", logit_mean=0.3),
        lambda t: (
            0.79 * normal_cdf(logit(t) - MU)
            + 0.11 * (1 - normal_cdf(-2 * logit(t) - 0.3))
            + 0.10 * (1 - normal_cdf(-2 * logit(t) - 5.36))
        ),
    ),
    "sigma": (Timesteps("sigma", flow_shift=2.0), lambda t: unshift(t, 2.0)),
    "sigma, logit_normal": (
        Timesteps("sigma", weighting="logit_normal", logit_mean=0.4, logit_std=0.9),
        lambda t: normal_cdf((logit(t) + 0.4) / 0.9),
    ),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
@pytest.mark.parametrize("t", [0.02, 0.3, 0.5, 0.9])
def test_distribution_is_the_closed_form(name: str, t: float) -> None:
    settings, cdf = CLOSED_FORMS[name]
    assert share_below(settings, t) == pytest.approx(cdf(t), abs=2e-4)


@pytest.mark.parametrize("scale", [-0.9, 0.5, 1.29])
def test_mode_has_the_density_of_the_paper(scale: float) -> None:
    """Density 1 / |f'(u)| at t = f(u), with f(u) = 1 - u - scale (cos^2(pi u / 2) - 1 + u) (paper, eq. 20)."""
    u = grid(2_000_001)
    f = 1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    for t in (0.1, 0.4, 0.75):
        expected = (f < t).double().mean().item()
        found = share_below(Timesteps("sigma", weighting="mode", mode_scale=scale), t)
        assert found == pytest.approx(expected, abs=2e-4)


def test_agrees_with_diffusers_density_of_the_sigma_mode() -> None:
    from diffusers.training_utils import compute_density_for_timestep_sampling

    torch.manual_seed(0)
    for weighting in ("logit_normal", "mode"):
        theirs = 1 - compute_density_for_timestep_sampling(
            weighting, 200_000, logit_mean=0.5, logit_std=0.8, mode_scale=1.29
        )
        ours = levels(
            Timesteps("sigma", weighting=weighting, logit_mean=0.5, logit_std=0.8), grid(200_000), TOKENS
        )
        shares = torch.searchsorted(theirs.sort().values, ours.float().sort().values) / len(ours)
        assert (shares - grid(200_000)).abs().max() < 5e-3  # Kolmogorov-Smirnov distance


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_limits_squeeze_the_distribution(name: str) -> None:
    settings, cdf = CLOSED_FORMS[name]
    limited = Timesteps(**{**settings.__dict__, "minimum": 0.2, "maximum": 0.7})
    t = levels(limited, grid(), TOKENS)
    assert t.min() >= 0.2 and t.max() <= 0.7
    assert share_below(limited, 0.2 + 0.5 * 0.3) == pytest.approx(cdf(0.3), abs=2e-4)


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_preserved_shape_is_the_conditional_distribution(name: str) -> None:
    settings, cdf = CLOSED_FORMS[name]
    low, high = 0.05, 0.6
    limited = Timesteps(**{**settings.__dict__, "minimum": low, "maximum": high, "preserve_shape": True})
    t = levels(limited, grid(), TOKENS)
    assert t.min() >= torch.tensor(low) and t.max() <= torch.tensor(high)
    for point in (0.1, 0.3, 0.5):
        expected = (cdf(point) - cdf(low)) / (cdf(high) - cdf(low))
        assert share_below(limited, point) == pytest.approx(expected, abs=3e-4)


def test_preserving_the_shape_of_nothing_is_an_error() -> None:
    narrow = Timesteps("sigmoid", sigmoid_scale=0.01, minimum=0.9, preserve_shape=True)
    with pytest.raises(UserError, match="nothing between 0.9 and 1"):
        levels(narrow, grid(10), TOKENS)


def test_minimum_and_maximum_mean_the_same_in_sigma_mode() -> None:
    t = levels(Timesteps("sigma", minimum=0.0, maximum=0.5), grid(), TOKENS)
    assert t.max() <= 0.5


def test_extremes_stay_finite() -> None:
    for settings, _ in CLOSED_FORMS.values():
        t = levels(settings, torch.tensor([0.0, 1.0], dtype=torch.float64), TOKENS)
        assert torch.isfinite(t).all() and t.min() >= 0 and t.max() <= 1


def test_weights_by_hand() -> None:
    t = torch.tensor([0.5, 0.25, 1e-5])
    assert loss_weights("none", t).tolist() == [1, 1, 1]
    assert loss_weights("sigma_sqrt", t).tolist() == pytest.approx([4, 16, 1e6])
    assert loss_weights("cosmap", t[:2]).tolist() == pytest.approx([4 / math.pi, 2 / (math.pi * 0.625)])


def test_weights_are_those_of_diffusers() -> None:
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    t = torch.linspace(0.01, 1, 50)
    for weighting in ("sigma_sqrt", "cosmap", "none"):
        theirs = compute_loss_weighting_for_sd3(weighting, t)
        assert torch.allclose(loss_weights(weighting, t), theirs, rtol=1e-6)


@pytest.mark.parametrize(("count", "buckets"), [(40, 10), (43, 10), (7, 10)])
def test_stratified_draws_fill_every_range_alike(count: int, buckets: int) -> None:
    u = stratified(count, buckets, torch.Generator().manual_seed(1))
    shares = torch.bincount((u * buckets).long(), minlength=buckets)
    assert len(u) == count and shares.max() - shares.min() <= 1
    assert not torch.equal(u, u.sort().values)
