"""LoHa and LoKr in training, against lycoris: one linear's result and gradients, and files in both directions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.functional.general import factorization
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import load_file
from torch import nn

from kontext.errors import UserError
from kontext.lora.adapter import Size, attach, targets, wrap
from kontext.lora.files import load_weights, save_lora
from kontext.lora.linear import AdapterLinear
from kontext.lora.products import LohaLinear, LokrLinear, factorise
from tests.lora.effective import effective, our_model
from tests.lora.models import CONFIG, make_transformer, relative_error
from tests.lora.reference import assert_same_change, base_weights, merged_by_us, randomise_adapter, read

RANK, ALPHA = 3, 2.0
CASES: dict[str, tuple[type[AdapterLinear], type[nn.Module], dict[str, Any]]] = {
    "loha": (LohaLinear, LohaModule, {}),
    "lokr": (LokrLinear, LokrModule, {"factor": 4}),
    "lokr-full": (LokrLinear, LokrModule, {"factor": -1}),
}


def pair(case: str, rows: int = 48, columns: int = 32) -> tuple[AdapterLinear, nn.Module]:
    """The same random adapter around the same linear, as ours and as lycoris'."""
    ours, theirs, more = CASES[case]
    torch.manual_seed(0)
    base = nn.Linear(columns, rows)
    mine = ours(base, rank=RANK, alpha=ALPHA, **more)
    randomise_adapter(mine)
    other = theirs("x", base, 1.0, RANK, ALPHA, **more)
    other.apply_to()
    other.load_state_dict(mine.learned, strict=False)
    return mine, other


@pytest.mark.parametrize("case", CASES)
def test_result_and_gradients_are_those_of_lycoris(case: str):
    mine, theirs = pair(case)
    x = torch.randn(2, 5, 32, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    mine.base.forward, patched = nn.Linear.forward.__get__(mine.base), mine.base.forward
    found, expected = mine(x), patched(y)
    assert relative_error(found, expected) < 1e-6
    assert relative_error(found, mine.base(x)) > 0.05  # or the test would prove little
    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert relative_error(x.grad, y.grad) < 1e-5
    for name, parameter in mine.learned.items():
        assert relative_error(parameter.grad, theirs.get_parameter(name).grad) < 1e-5, name


@pytest.mark.parametrize("case", CASES)
def test_first_weights_are_distributed_as_in_lycoris_and_change_nothing(case: str):
    ours, theirs, more = CASES[case]
    base = nn.Linear(512, 768)
    mine, other = ours(base, rank=4, alpha=1, **more), theirs("x", base, 1.0, 4, 1.0, **more)
    mine.draw(torch.Generator().manual_seed(0))
    assert mine.learned.keys() == {name for name, _ in other.named_parameters() if not name.startswith("org")}
    for name, parameter in mine.learned.items():
        wanted = other.get_parameter(name)
        assert parameter.shape == wanted.shape
        few = parameter.numel() < 100
        assert parameter.std().item() == pytest.approx(wanted.std().item(), rel=0.5 if few else 0.15), name
    x = torch.randn(3, 512)
    assert torch.equal(mine(x), base(x))


@pytest.mark.parametrize("factor", [-1, 2, 4, 7, 8, 16])
def test_splits_are_those_of_lycoris(factor: int):
    for size in (1, 2, 13, 64, 250, 360, 3072, 9216, 12288, 15360, 18432, 21504):
        assert factorise(size, factor) == factorization(size, factor), size


def wrapped(case: str, seed: int = 3) -> tuple[nn.Module, dict[str, AdapterLinear]]:
    """A small model of ours with a random network."""
    ours, _, more = CASES[case]
    model = our_model()
    sizes = dict.fromkeys(targets(model), Size(RANK, ALPHA))
    modules = wrap(model, sizes, seed=0, make=lambda *a, **k: ours(*a, **k, **more))
    randomise_adapter(model, seed)
    return model, modules


def acting(model: nn.Module, modules: dict[str, AdapterLinear]) -> dict[str, torch.Tensor]:
    for module in modules.values():
        module.in_features = module.base.in_features
    return base_weights() | effective(model, list(modules))


@pytest.mark.parametrize("case", CASES)
def test_our_file_makes_the_same_change_in_lycoris_and_here(tmp_path: Path, case: str):
    model, modules = wrapped(case)
    save_lora(tmp_path / "a.safetensors", modules)
    expected = acting(model, modules)
    adapter = read(tmp_path / "a.safetensors")
    assert adapter.kinds == ["LoHa" if case == "loha" else "LoKr"] and not adapter.unmatched
    assert assert_same_change(merged_by_us(adapter), expected) == len(modules)

    tensors, theirs = load_file(tmp_path / "a.safetensors"), CASES[case][1]
    for name, module in modules.items():
        parts = {
            k.partition(".")[2]: v
            for k, v in tensors.items()
            if k.startswith(f"lora_unet_{name.replace('.', '_')}.")
        }
        other = theirs("x", module.base, 1.0, RANK, parts.pop("alpha").item(), **CASES[case][2])
        assert not other.load_state_dict(parts, strict=False).unexpected_keys
        other.apply_to()
        eye = torch.eye(module.base.in_features)
        with torch.no_grad():
            found = (module.base(eye) - module.base.bias).T
        change = expected[f"{name}.weight"] - base_weights()[f"{name}.weight"]
        assert (found - expected[f"{name}.weight"]).norm() / change.norm() < 1e-5, name


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_from_a_file(tmp_path: Path, case: str):
    model, modules = wrapped(case)
    save_lora(tmp_path / "a.safetensors", modules)
    again, fresh = wrapped(case, seed=9)
    for module in fresh.values():
        module.alpha *= 1 if getattr(module, "full", False) else 2
    assert load_weights(fresh, read(tmp_path / "a.safetensors")) == []
    assert_same_change(acting(again, fresh), acting(model, modules))


def test_a_file_of_another_kind_or_size_is_refused(tmp_path: Path):
    _, modules = wrapped("loha")
    save_lora(tmp_path / "a.safetensors", modules)
    adapter = read(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="is no LoKr there. Set --network-module"):
        load_weights(wrapped("lokr")[1], adapter)
    with pytest.raises(UserError, match="is no LoRA there. Set --network-module"):
        load_weights(attach(make_transformer(CONFIG), rank=4, alpha=1, seed=0), adapter)
    model = make_transformer(CONFIG)
    other = wrap(model, dict.fromkeys(targets(model), Size(5, 1)), seed=0, make=LohaLinear)
    with pytest.raises(UserError, match="is no LoHa of rank 5"):
        load_weights(other, adapter)


@pytest.mark.parametrize("case", CASES)
def test_dropouts(case: str):
    mine, _ = pair(case)
    mine.base.forward = nn.Linear.forward.__get__(mine.base)
    x = torch.randn(1, 2, 32).expand(4000, 2, 32)
    full = (mine.eval()(x) - mine.base(x))[0]
    mine.rank_dropout = 0.25
    change = mine.train()(x) - mine.base(x)
    dropped = (change.abs() < 1e-6).all(1)
    assert 0.2 < dropped.float().mean() < 0.3
    assert relative_error(change.mean(0), full) < 0.05
    mine.rank_dropout, mine.module_dropout = 0.0, 1.0
    assert torch.equal(mine(x), mine.base(x))
