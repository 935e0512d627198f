"""Bytes of weights by place, against models that were really loaded and placed."""

from functools import partial

import pytest
import torch
from torch import nn

from kontext.checkpoints import load_transformer
from kontext.memory.modulation import HostModulation
from kontext.memory.placement import Placement
from kontext.memory.streaming import Streamed
from kontext.memory.weights import Placed, weights_of
from kontext.model.transformer import FLUX, Transformer
from kontext.quant import stored_bytes

CPU = torch.device("cpu")
PLACEMENTS = [Placement(), Placement(0, True), Placement(1), Placement("max", True)]


def nbytes(module: nn.Module) -> int:
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return sum(tensor.nbytes for tensor in tensors)


def really_placed(model: Transformer) -> Placed:
    """Of the tensors themselves: where the placement has put them."""
    streamed = [module for module in model.modules() if isinstance(module, Streamed)]
    away = {m for host in model.modules() if isinstance(host, HostModulation) for m in host.modules()}
    host = sum(map(nbytes, away))
    moved = {(piece.module, piece.name) for s in streamed for piece in s.ring.slabs[s.index].pieces}
    stays = sum(
        tensor.nbytes
        for module in model.modules()
        if module not in away
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        if (module, name) not in moved
    )
    slots = streamed[0].ring.slots if streamed else []
    slabs = sum(s.ring.slabs[s.index].memory.numel() for s in streamed)
    return Placed(stays, sum(slot.numel() for slot in slots), host + slabs)


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "mode"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.float32, "fp8"), (torch.bfloat16, "fp8_scaled"),
     (torch.bfloat16, "fp8_fast"), (torch.bfloat16, "nf4")],
)  # fmt: skip
def test_equal_to_a_loaded_model(tiny_files, placement, dtype, mode):
    model = load_transformer(
        tiny_files.dit, device=CPU, dtype=dtype, quantization=mode, on_host=placement.on_host
    )
    placement.apply(model, CPU)
    linear = partial(stored_bytes, mode=mode) if mode else None
    found = weights_of(model.config, itemsize=dtype.itemsize, linear=linear).placed(placement)
    assert found == really_placed(model)


def test_the_published_model():
    """23.8 GB in bfloat16, of which 6.45 are modulation; a slot of the ring holds a double block of 453 MB."""
    weights = weights_of(FLUX, itemsize=2)
    placed = weights.placed(Placement())
    assert placed == Placed(device=2 * 11_901_408_320, ring=0, host=0)
    away = weights.placed(Placement("max", modulation=True))
    assert away.ring == 2 * 453_096_448
    # 19 (24 D^2 + 18 D + 512) + 38 (12 D^2 + 8 D + 256), with D = 3072, work on tokens; the other is modulation.
    assert away.host == 2 * (8_608_715_776 + 3_228_567_552)
    assert away.device == placed.device - away.host
