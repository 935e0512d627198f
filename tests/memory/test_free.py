"""How much more memory a GPU can give, of a GPU that is pretended."""

import pytest
import torch
from torch.cuda._utils import _get_device_index

from kontext.memory.free import free_bytes

FREE, TOTAL, RESERVED, USED = 30, 100, 20, 5


@pytest.fixture
def share(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The share of the second of two GPUs that this process may take. torch asks for a number as strictly as there."""
    parts = [1.0]

    def told(device: object, value: object) -> object:
        assert _get_device_index(device, optional=True) == 1
        return value

    def fraction(device: object) -> float:
        assert _get_device_index(device) == 1  # as torch does: not optional
        return parts[0]

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: told(device, (FREE, TOTAL)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: told(device, RESERVED))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: told(device, USED))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", fraction)
    return parts


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_what_torch_holds_without_using_it_counts(share: list[float], name: str) -> None:
    assert free_bytes(torch.device(name)) == FREE + RESERVED - USED
    share[0] = 0.4
    assert free_bytes(torch.device(name)) == 40 - USED
