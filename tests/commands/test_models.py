"""In which form the options keep the weights."""

import pytest
import torch

from kontext.commands.models import quantization, told_quantization
from kontext.errors import UserError
from kontext.options.generate import Generate
from kontext.options.resolve import resolve
from kontext.options.train import Train

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("given", "form"),
    [
        ([], None),
        (["fp8"], "fp8"),
        (["fp8", "fp8_scaled"], "fp8_scaled"),
        (["fp8_fast"], "fp8_fast"),
        (["fp8", "fp8_scaled", "fp8_fast"], "fp8_fast"),
        (["int8"], "int8"),
        (["int8", "int8_fast"], "int8_fast"),
        (["nf4"], "nf4"),
    ],
)
def test_what_is_asked_for(monkeypatch, given, form):
    """As in musubi-tuner, flags of one form add up."""
    monkeypatch.setattr("kontext.commands.models.supported", lambda device, dtype: True)
    assert quantization(Generate(**dict.fromkeys(given, True)), CPU) == form


@pytest.mark.parametrize("model", [Generate, Train])
@pytest.mark.parametrize("given", [("fp8", "int8"), ("fp8_fast", "nf4"), ("int8_fast", "nf4")])
def test_weights_have_one_form(model, given):
    needed = {"dit": "d", "dataset_config": "d", "output_dir": "o", "output_name": "n"}
    values = {name: value for name, value in needed.items() if name in model.model_fields}
    first, second = (f"--{name.replace('_', '-')}" for name in given)
    with pytest.raises(UserError, match=f"{first} and {second} exclude each other"):
        resolve(model, values | dict.fromkeys(given, True))


@pytest.mark.parametrize(("fast", "plain"), [("fp8_fast", "fp8_scaled"), ("int8_fast", "int8")])
def test_a_device_without_products_says_so_and_goes_on(monkeypatch, capsys, fast, plain):
    monkeypatch.setattr("kontext.commands.models.supported", lambda device, dtype: False)
    options = Generate(**{fast: True})
    assert quantization(options, CPU) == plain and not capsys.readouterr().err
    assert told_quantization(options, CPU) == plain
    said = " ".join(capsys.readouterr().err.split())
    assert f"--{fast.replace('_', '-')}: cpu has no fast products" in said and plain.replace("_", "-") in said
