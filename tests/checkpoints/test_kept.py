"""Models whose large weights are kept in bfloat16 and computed with in float32."""

import pytest
import torch
from torch import nn

from kontext.checkpoints import load_t5, load_transformer
from kontext.quant import QuantisedLinear
from kontext.quant.widened import WidenedLinear
from tests.checkpoints.test_text import IDS, hidden
from tests.checkpoints.test_transformer import CPU, MODES, ours
from tests.compare import relative_error

KEPT = CPU | {"kept": torch.bfloat16}


@torch.no_grad()
def rounded(model, matrices):
    """A float32 model whose matrices of these names are rounded to bfloat16."""
    for name in matrices:
        weight = model.get_parameter(name)
        weight.copy_(weight.bfloat16())
    return model


def kept_names(model):
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, WidenedLinear)}


@pytest.mark.parametrize("layout", ["dit", "dit_diffusers"])
def test_the_transformer_is_the_one_of_rounded_weights(tiny_files, inputs, layout):
    model = load_transformer(getattr(tiny_files, layout), **KEPT)
    plain = load_transformer(getattr(tiny_files, layout), **CPU)
    names = kept_names(model)
    linears = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    assert names == {f"{name}.weight" for name in linears if "_blocks." in name}
    assert relative_error(ours(model, inputs), ours(plain, inputs)) > 1e-4
    assert relative_error(ours(model, inputs), ours(rounded(plain, names), inputs)) < 1e-6


def test_all_of_its_large_weights_take_two_bytes_and_the_rest_is_exact(tiny_files):
    model, plain = load_transformer(tiny_files.dit, **KEPT), load_transformer(tiny_files.dit, **CPU)
    there, names = plain.state_dict(), kept_names(model)
    for name, tensor in model.state_dict().items():
        if name in names:
            assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, there[name].bfloat16())
        else:
            assert tensor.dtype == torch.float32 and torch.equal(tensor, there[name])
    assert not any(tensor.requires_grad for tensor in model.parameters())


def test_gradients_are_those_of_rounded_weights(tiny_files, inputs):
    model, plain = load_transformer(tiny_files.dit, **KEPT), load_transformer(tiny_files.dit, **CPU)
    gradients = []
    for each in (model, rounded(plain, kept_names(model))):
        img = inputs.img.clone().requires_grad_()
        x = inputs
        each(
            img, x.img_ids[None], x.txt, x.txt_ids[None], x.t, x.vector, x.guidance
        ).square().sum().backward()
        gradients.append(img.grad)
    assert relative_error(*gradients) < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_weights_in_fewer_bits_stay_so_and_modulation_is_kept(tiny_files, mode):
    model = load_transformer(tiny_files.dit, quantization=mode, **KEPT)
    plain = load_transformer(tiny_files.dit, quantization=mode, **CPU)
    few = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantisedLinear) and not isinstance(module, WidenedLinear)
    }
    assert few and all(torch.equal(module.weight, plain.get_submodule(n).weight) for n, module in few.items())
    assert {name.split(".")[-2] for name in kept_names(model)} == {"lin"}


def test_nothing_changes_where_both_are_one_type(tiny_files):
    for dtype in (torch.float32, torch.bfloat16):
        for load, file in ((load_transformer, tiny_files.dit), (load_t5, tiny_files.t5)):
            model = load(file, device="cpu", dtype=dtype, kept=dtype)
            assert not kept_names(model) and {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("fp8", [False, True])
def test_t5_is_the_one_of_rounded_weights(tiny_files, fp8):
    model, plain = load_t5(tiny_files.t5, fp8=fp8, **KEPT), load_t5(tiny_files.t5, fp8=fp8, **CPU)
    names = kept_names(model)
    assert bool(names) is not fp8
    assert {model.get_parameter(name).dtype for name in names} <= {torch.bfloat16}
    assert hidden(model, IDS).dtype == torch.float32
    assert relative_error(hidden(model, IDS), hidden(rounded(plain, names), IDS)) < 1e-6
