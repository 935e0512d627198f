"""DoRA in training, against peft and lycoris."""

from pathlib import Path

import pytest
import torch
from lycoris.modules.locon import LoConModule
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from kontext.lora.adapter import Size, attach, targets, wrap
from kontext.lora.dora import DoraLinear
from kontext.lora.files import load_weights, save_lora
from kontext.lora.linear import AdapterLinear
from kontext.quant import QuantisedLinear, quantise
from tests.lora.effective import effective, our_model
from tests.lora.models import relative_error
from tests.lora.reference import assert_same_change, base_weights, merged_by_us, randomise_adapter, read, save

RANK, ALPHA = 3, 2.0


class Alone(nn.Module):
    """A model of one linear, for peft."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def in_peft(modules: nn.Module, names: list[str]) -> nn.Module:
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, use_dora=True)
    return inject_adapter_in_model(config, modules)


def peft_names(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What peft calls the parts of one of our modules."""
    return {
        f"{name}.lora_A.weight": tensors["lora_down.weight"],
        f"{name}.lora_B.weight": tensors["lora_up.weight"],
        f"{name}.lora_magnitude_vector": tensors["dora_scale"].squeeze(1),
    }


def random_linear() -> tuple[DoraLinear, nn.Linear]:
    torch.manual_seed(0)
    base = nn.Linear(32, 48)
    module = DoraLinear(base, rank=RANK, alpha=ALPHA)
    randomise_adapter(module)
    return module, base


def test_result_and_gradients_are_those_of_peft():
    module, base = random_linear()
    theirs = in_peft(Alone(base), ["linear"])
    loaded = set_peft_model_state_dict(theirs, peft_names("linear", module.learned))
    assert not loaded.unexpected_keys
    x = torch.randn(2, 5, 32, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    found, expected = module(x), theirs(y)
    assert relative_error(found, expected) < 1e-6
    assert relative_error(found, base(x)) > 0.1  # or the test would prove little
    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert relative_error(x.grad, y.grad) < 1e-5
    layer = theirs.linear
    for part, parameter in (
        ("lora_down.weight", layer.lora_A["default"].weight),
        ("lora_up.weight", layer.lora_B["default"].weight),
        ("dora_scale", layer.lora_magnitude_vector["default"].weight),
    ):
        assert relative_error(module.learned[part].grad.view_as(parameter), parameter.grad) < 1e-5, part


def test_a_new_adapter_changes_nothing():
    base = nn.Linear(32, 48)
    module = DoraLinear(base, rank=RANK, alpha=ALPHA)
    module.draw(torch.Generator().manual_seed(0))
    x = torch.randn(4, 32)
    torch.testing.assert_close(module(x), base(x), rtol=1e-6, atol=1e-6)
    assert module.lora_down.weight.std() > 0


@pytest.mark.parametrize("mode", ["fp8", "fp8_scaled", "int8", "nf4"])
def test_it_stands_on_weights_in_few_bits(mode: str):
    torch.manual_seed(0)
    base = nn.Linear(128, 48)
    rounded = quantise(base.weight.detach(), mode)
    few = QuantisedLinear(rounded.weight, rounded.scale, base.bias.detach())
    plain = nn.Linear(128, 48)
    plain.load_state_dict({"weight": few.dequantised(torch.float32), "bias": base.bias})
    ours, same = (DoraLinear(b, rank=RANK, alpha=ALPHA) for b in (few, plain))
    for module in (ours, same):
        module.draw(torch.Generator().manual_seed(1))
        nn.init.constant_(module.lora_up.weight, 0.1)
    x = torch.randn(4, 128)
    torch.testing.assert_close(ours(x), same(x))


def wrapped(seed: int = 3) -> tuple[nn.Module, dict[str, AdapterLinear]]:
    model = our_model()
    modules = wrap(model, dict.fromkeys(targets(model), Size(RANK, ALPHA)), seed=0, make=DoraLinear)
    randomise_adapter(model, seed)
    return model, modules


def acting(model: nn.Module, modules: dict[str, AdapterLinear]) -> dict[str, Tensor]:
    for module in modules.values():
        module.in_features = module.base.in_features
    return base_weights() | effective(model, list(modules))


def parts(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    stem = f"lora_unet_{name.replace('.', '_')}."
    return {key.removeprefix(stem): value for key, value in tensors.items() if key.startswith(stem)}


def test_our_file_makes_the_same_change_in_lycoris_peft_and_here(tmp_path: Path):
    model, modules = wrapped()
    save_lora(tmp_path / "a.safetensors", modules)
    expected = acting(model, modules)
    adapter = read(tmp_path / "a.safetensors")
    assert adapter.kinds == ["DoRA"] and not adapter.unmatched
    assert assert_same_change(merged_by_us(adapter), expected) == len(modules)

    tensors = load_file(tmp_path / "a.safetensors")
    theirs = in_peft(our_model(), list(modules))
    renamed = {k: v for name in modules for k, v in peft_names(name, parts(tensors, name)).items()}
    assert not set_peft_model_state_dict(theirs, renamed).unexpected_keys
    assert_same_change(base_weights() | effective(theirs, list(modules)), expected)

    for name, module in modules.items():
        mine = parts(tensors, name)
        other = LoConModule("x", module.base, 1.0, RANK, mine.pop("alpha").item(), weight_decompose=True)
        assert not other.load_state_dict(mine, strict=False).unexpected_keys
        other.apply_to()
        with torch.no_grad():
            found = (module.base(torch.eye(module.base.in_features)) - module.base.bias).T
        change = expected[f"{name}.weight"] - base_weights()[f"{name}.weight"]
        assert (found - expected[f"{name}.weight"]).norm() / change.norm() < 1e-5, name


def test_training_goes_on_from_files_of_ours_and_of_peft(tmp_path: Path):
    model, modules = wrapped()
    save_lora(tmp_path / "ours.safetensors", modules)
    theirs = in_peft(our_model(), list(modules))
    randomise_adapter(theirs, seed=4)
    their_file = {f"base_model.model.{k}": v for k, v in get_peft_model_state_dict(theirs).items()}
    for key in [key for key in their_file if key.endswith("lora_A.weight")]:
        their_file[key.replace("lora_A.weight", "alpha")] = torch.tensor(ALPHA)
    save(tmp_path / "theirs.safetensors", their_file)
    for file, expected in (
        ("ours", acting(model, modules)),
        ("theirs", base_weights() | effective(theirs, list(modules))),
    ):
        again, fresh = wrapped(seed=9)
        for module in fresh.values():
            module.alpha *= 2
        assert load_weights(fresh, read(tmp_path / f"{file}.safetensors")) == []
        assert_same_change(acting(again, fresh), expected)


def test_a_plain_lora_keeps_its_change(tmp_path: Path):
    plain = our_model()
    modules = attach(plain, rank=RANK, alpha=ALPHA, seed=0)
    randomise_adapter(plain)
    save_lora(tmp_path / "a.safetensors", modules)
    model, fresh = wrapped()
    assert load_weights(fresh, read(tmp_path / "a.safetensors")) == []
    assert_same_change(acting(model, fresh), acting(plain, modules))
