"""Inputs of blocks that wait on the host: the gradients are those without, whatever the copies take."""

import random
import time

import pytest
import torch
from torch import Tensor

from kontext.memory.copier import ThreadCopier
from kontext.memory.offloading import AHEAD, LEAVING, Shelf
from kontext.memory.recompute import recompute_blocks
from kontext.memory.remaking import remake_blocks
from tests.memory.test_remaking import adapted, gradients


class Late(ThreadCopier):
    """Copies that take a random while. A wait that is missing shows, as does memory that is used again too early."""

    def __init__(self) -> None:
        super().__init__()
        self.draws = random.Random(0)
        self.copies = 0

    def copy(self, target: Tensor, source: Tensor) -> None:
        time.sleep(self.draws.random() * 0.01)
        super().copy(target, source)
        self.copies += 1


def test_gradients_are_those_without() -> None:
    expected = gradients(adapted(double=2, single=3))
    model, copier = adapted(double=2, single=3), Late()
    remake_blocks(model)
    recompute_blocks(model, "offloaded", copier=copier)
    for _ in range(2):
        found = gradients(model)
        assert all(map(torch.equal, found, expected))
        model.zero_grad()
    assert copier.copies == 2 * 2 * (2 * 2 + 3)  # there and back, twice, of two streams or one


def test_few_tensors_are_on_the_device_at_a_time() -> None:
    shelf = Shelf(Late())
    waiting = [shelf.pack(torch.full((100,), float(i))) for i in range(6)]
    assert [entry.here is not None for entry in waiting] == [False] * (6 - LEAVING) + [True] * LEAVING
    for i in reversed(range(6)):
        assert torch.equal(shelf.unpack(waiting[i]), torch.full((100,), float(i)))
        assert [j for j in range(i) if waiting[j].here is not None] == list(range(max(0, i - AHEAD), i))
        waiting.pop()


def test_a_cpu_keeps_its_tensors() -> None:
    shelf, tensor = Shelf(), torch.ones(3)
    assert shelf.unpack(shelf.pack(tensor)) is tensor


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gradients_are_those_without_on_a_gpu() -> None:
    def on_gpu(policy: str) -> list[Tensor]:
        model = adapted(double=2, single=6).cuda()
        recompute_blocks(model, policy)
        return gradients(model)

    assert all(map(torch.equal, on_gpu("offloaded"), on_gpu("whole")))
