"""Page-locked memory, with a CUDA runtime that only takes notes."""

import gc
import mmap
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from kontext.errors import UserError
from kontext.memory.modulation import HostModulation
from kontext.memory.pinned import pinned
from kontext.memory.streaming import Slab
from kontext.model.blocks import Modulation


class Runtime:
    """Knows which addresses are locked, and up to where. CUDA refuses pages that are locked already."""

    def __init__(self):
        self.locked = {}

    def cudaHostRegister(self, address, nbytes, flags):  # noqa: N802
        pages = range(address // mmap.PAGESIZE, -(-(address + nbytes) // mmap.PAGESIZE))
        taken = any(pages.start < other.stop and other.start < pages.stop for other in self.locked.values())
        if taken:
            return 712
        self.locked[address] = pages
        return 0

    def cudaHostUnregister(self, address):  # noqa: N802
        del self.locked[address]
        return 0


def check(error):
    if error:
        raise RuntimeError(f"error {error}")


@pytest.fixture
def runtime(monkeypatch):
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", check)
    return runtime


def test_memory_is_locked_while_it_is_held(runtime):
    memory = pinned(5000)
    assert memory.shape == (5000,)
    assert runtime.locked.keys() == {memory.data_ptr()} and memory.data_ptr() % mmap.PAGESIZE == 0
    del memory
    assert not runtime.locked


def test_small_pieces_beside_each_other(runtime):
    pieces = [pinned(100) for _ in range(50)]
    assert runtime.locked.keys() == {piece.data_ptr() for piece in pieces}


@pytest.mark.parametrize("make", [HostModulation, Slab])
def test_weights_on_the_host_stay_locked(runtime, make):
    base = Modulation(32, 3) if make is HostModulation else nn.Sequential(nn.Linear(32, 32))
    holder = make(base.requires_grad_(False))
    gc.collect()
    pages = [page for pages in runtime.locked.values() for page in pages]
    for parameter in base.parameters():
        assert parameter.data_ptr() // mmap.PAGESIZE in pages
    del holder, base
    gc.collect()
    assert not runtime.locked


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTFORK"), reason="a matter of Linux")
def test_processes_that_load_batches_get_no_copy(runtime):
    """Linux copies what a device may be reading at once when a process forks: gigabytes for each of them."""
    memory = pinned(50_000)
    memory.fill_(7)
    (child := os.fork()) or os._exit(_is_mapped(memory.data_ptr()))
    assert _is_mapped(memory.data_ptr())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (memory == 7).all()


def _is_mapped(address):
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(first, 16) <= address < int(end, 16) for first, end in ranges)


def test_no_memory_is_left(runtime, monkeypatch):
    monkeypatch.setattr(runtime, "cudaHostRegister", lambda *_: 2)
    with pytest.raises(UserError, match=r"locks no 0.00 GB more .*error 2.*--blocks-to-swap"):
        pinned(5000)


def test_without_cuda():
    assert pinned(7).shape == (7,) and pinned(0).shape == (0,)
