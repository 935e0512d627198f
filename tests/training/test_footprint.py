"""What optimizers keep: by hand for each number of a parameter, and against optimizers of the whole size."""

import pytest
import torch
from torch import nn

from kontext.training import footprint
from kontext.training.footprint import optimizer_bytes
from kontext.training.optimizers import make_optimizer

CPU = torch.device("cpu")
SHAPES = [(32, 3072), (9216, 32), (32, 3072)]
NUMBERS = sum(rows * columns for rows, columns in SHAPES)


def found(name: str, **arguments: float) -> float:
    """Bytes for each number."""
    return optimizer_bytes(name, SHAPES, arguments=arguments, device=CPU) / NUMBERS


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("adamw", {}, 8),  # mean and square in float32
        ("sgd", {}, 0),
        ("sgd", {"momentum": 0.9}, 4),
        ("adamw8bit", {}, 2),
        ("pagedadamw8bit", {}, 2),
        ("lion8bit", {}, 1),
        ("adamwschedulefree", {}, 8),
        ("prodigy", {}, 16),
    ],
)
def test_bytes_for_each_number(name, arguments, expected):
    assert found(name, **arguments) == pytest.approx(expected, rel=0.05, abs=0.01)


def test_adafactor_keeps_rows_and_columns():
    assert found("adafactor") * NUMBERS == pytest.approx(4 * sum(sum(shape) for shape in SHAPES), rel=0.01)


def test_large_parameters_are_tried_with_fewer_rows(monkeypatch):
    """And what comes out is what the real optimizer keeps."""
    monkeypatch.setattr(footprint, "LARGEST", 32 * 64)
    parameter = nn.Parameter(torch.ones(512, 64))
    optimizer = make_optimizer("adamw", [{"params": [parameter], "lr": 1e-3}], arguments={})
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = sum(value.nbytes for value in optimizer.state[parameter].values() if value.ndim)
    assert optimizer_bytes("adamw", [(512, 64)], arguments={}, device=CPU) == pytest.approx(kept, rel=0.01)
