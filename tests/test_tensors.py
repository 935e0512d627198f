"""What is written is a safetensors file, byte for byte where the package is free to choose but one order."""

import io

import pytest
import safetensors.torch
import torch

from kontext.tensors import DTYPES, pieces

TENSORS = {
    "b": torch.arange(6.0).reshape(2, 3),
    "a": torch.tensor(3.5),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "none": torch.zeros(0, 4),
    "turned": torch.arange(6.0).reshape(2, 3).T,
}


def written(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    file = io.BytesIO()
    for piece in pieces(tensors, metadata):
        file.write(piece)
    return file.getvalue()


@pytest.mark.parametrize("metadata", [{}, {"key": 'quote " é\n\x00猫'}])
def test_the_package_writes_the_same_bytes(metadata: dict[str, str]) -> None:
    plain = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    assert written(TENSORS, metadata) == safetensors.torch.save(plain, metadata=metadata or None)


def test_metadata_are_in_order() -> None:
    one, other = {"x": "1", "a": "2"}, {"a": "2", "x": "1"}
    assert written(TENSORS, one) == written(TENSORS, other)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_type_reads_back(dtype: torch.dtype) -> None:
    value = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    found = safetensors.torch.load(written({"x": value, "y": torch.ones(3)}, {}))["x"]
    assert found.dtype == dtype and torch.equal(found.float(), value.float())
