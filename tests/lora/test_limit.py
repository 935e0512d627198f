import pytest
import torch
from torch import Tensor, nn

from kontext.lora.dora import DoraLinear
from kontext.lora.limit import Limit, has_norm, norm_of
from kontext.lora.linear import AdapterLinear, LoraLinear
from kontext.lora.products import LohaLinear, LokrLinear

KINDS = {
    "lora": (LoraLinear, {"rank": 4, "alpha": 2.0}),
    "loha": (LohaLinear, {"rank": 3, "alpha": 1.5}),
    "lokr": (LokrLinear, {"rank": 2, "alpha": 1.0, "factor": 2}),
    "lokr in full": (LokrLinear, {"rank": 100, "alpha": 1.0, "factor": 4}),
}


def made(kind: str, size: float = 1.0) -> AdapterLinear:
    make, options = KINDS[kind]
    module = make(nn.Linear(24, 36), **options)
    generator = torch.Generator().manual_seed(len(kind))
    with torch.no_grad():
        for parameter in module.learned.values():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return module


def change(module: AdapterLinear) -> Tensor:
    """dW, column by column: what the module adds for each unit vector."""
    module, x = module.eval(), torch.eye(24)
    return (module(x) - module.base(x)).T.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_norms_are_those_of_the_explicit_change(kind: str) -> None:
    module = made(kind)
    torch.testing.assert_close(norm_of(module), change(module).norm(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_exceeds_the_limit_is_scaled_to_it_and_the_rest_is_left(kind: str) -> None:
    large, small, fresh = made(kind), made(kind, 0.1), made(kind, 0.0)
    before = [change(module) for module in (large, small)]
    most = float(before[0].norm()) / 3
    assert before[1].norm() < most
    limit = Limit({"large": large, "small": small, "fresh": fresh}, most)
    limit()
    torch.testing.assert_close(change(large), before[0] / 3, rtol=1e-4, atol=1e-5)
    assert torch.equal(change(small), before[1]) and not change(fresh).any()
    told = limit.measures()
    assert told["max_norm/keys_scaled"] == 1
    assert told["max_norm/max_key_norm"] == pytest.approx(most, rel=1e-5)
    assert told["max_norm/average_key_norm"] == pytest.approx((most + float(before[1].norm())) / 3, rel=1e-5)


def test_factors_share_the_scaling() -> None:
    module = made("lora")
    up, down = module.lora_up.weight.detach().clone(), module.lora_down.weight.detach().clone()
    Limit({"x": module}, norm_of(module).item() / 4)()
    torch.testing.assert_close(module.lora_up.weight, up / 2)
    torch.testing.assert_close(module.lora_down.weight, down / 2)


def test_a_dora_has_no_change_beside_the_weight() -> None:
    assert not has_norm(DoraLinear(nn.Linear(4, 4), rank=2, alpha=1.0))
