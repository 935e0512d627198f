"""Against torch's, of which one in float64 is exact enough to be the truth."""

import pytest
import torch
import torch.nn.functional as F

from kontext.model import gelu as module
from kontext.model.gelu import beside, gelu


def exact(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x.double(), approximate="tanh")


@pytest.fixture(params=[1, 24, 1 << 19])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE", request.param)


@pytest.mark.usefixtures("tile")
def test_values_are_exact_to_rounding() -> None:
    x = torch.cat(
        (torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e25, -1e25, 88, -88]))
    )
    found = gelu(x[:4000].view(5, 100, 8)).flatten()
    torch.testing.assert_close(found.double(), exact(x[:4000]), rtol=3e-6, atol=1e-7)
    found = gelu(x[None, 4000:])[0]
    torch.testing.assert_close(found.double(), exact(x[4000:]), rtol=3e-6, atol=1e-7)


def test_it_is_no_further_from_the_truth_than_torch() -> None:
    x = torch.randn(200, 300, generator=torch.Generator().manual_seed(0)) * 3
    torchs = (F.gelu(x, approximate="tanh").double() - exact(x)).norm()
    assert (gelu(x).double() - exact(x)).norm() < 2 * torchs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types_are_torchs_own(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 8).to(dtype)
    assert torch.equal(gelu(x), F.gelu(x, approximate="tanh"))


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beside_is_concatenation_in_both_directions(dtype: torch.dtype) -> None:
    wide = torch.randn(2, 7, 20, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    weights = torch.randn(2, 7, 20, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = []
    for join in (beside, lambda first, hidden: torch.cat((first, F.gelu(hidden, approximate="tanh")), -1)):
        out = join(*wide.split((6, 14), -1))
        found.append((out, *torch.autograd.grad(out, wide, weights)))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=3e-6, atol=1e-6)


def test_the_gradient_is_that_of_plain_autograd() -> None:
    x = torch.randn(4, 9, requires_grad=True)
    weights = torch.randn(4, 9)
    ours, plain = (
        torch.autograd.grad(f(x), x, weights)[0] for f in (gelu, lambda x: F.gelu(x, approximate="tanh"))
    )
    assert torch.equal(ours, plain)
