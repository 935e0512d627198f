"""Streaming changes where weights lie, and no digit of any result."""

import random
import time
from contextlib import suppress

import pytest
import torch

from kontext.checkpoints import load_transformer
from kontext.memory.copier import ThreadCopier
from kontext.memory.recompute import recompute_blocks
from kontext.memory.streaming import Slab, Streamed, stream_blocks, streamed_indices
from kontext.model.transformer import Transformer, TransformerConfig
from kontext.quant import FP8, supported
from tests import tiny

CONFIG = TransformerConfig(16, 16, 8, 8, 32, 2, 64, 3, 5, (4, 6, 6), 1e4, True)


def build():
    torch.manual_seed(0)
    return Transformer(CONFIG).requires_grad_(False)


def inputs():
    g = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, 6, 16, generator=g),
        torch.zeros(1, 6, 3),
        torch.randn(2, 3, 8, generator=g),
        torch.zeros(1, 3, 3),
        torch.rand(2, generator=g),
        torch.randn(2, 8, generator=g),
        torch.ones(2),
    )


@pytest.fixture
def slow_copies(monkeypatch):
    """Copies that take a random while: a wait that is missing shows."""
    copy = ThreadCopier.copy
    draws = random.Random(0)

    def late(self, target, source):
        time.sleep(draws.random() * 0.01)
        copy(self, target, source)

    monkeypatch.setattr(ThreadCopier, "copy", late)


@pytest.mark.parametrize("blocks_to_swap", [1, 2, 3, "max"])
@pytest.mark.parametrize("slots", [2, 3])
def test_sampling_is_bit_equal(slow_copies, blocks_to_swap, slots):
    model, reference = build(), build()
    stream_blocks(model, blocks_to_swap, torch.device("cpu"), slots=slots)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(*inputs()), reference(*inputs()))


def train(model, *, recompute, given=None):
    """Three steps' worth of gradients for a trained offset in front of all blocks."""
    if recompute:
        recompute_blocks(model)
    img, *rest = given or inputs()
    offset = torch.zeros(img.shape[-1], device=img.device, requires_grad=True)
    gradients = []
    for _ in range(3):
        (gradient,) = torch.autograd.grad(model(img + offset, *rest).square().mean(), offset)
        gradients.append(gradient)
    return torch.stack(gradients)


@pytest.mark.parametrize("blocks_to_swap", [2, "max"])
@pytest.mark.parametrize("recompute", [True, False])
def test_training_is_bit_equal(slow_copies, blocks_to_swap, recompute):
    model = build()
    stream_blocks(model, blocks_to_swap, torch.device("cpu"))
    assert torch.equal(train(model, recompute=recompute), train(build(), recompute=recompute))


@pytest.mark.parametrize("recompute", [True, False])
def test_autograd_keeps_no_weights(recompute):
    """The memory of a training step does not grow with the streamed weights."""
    model = build()
    stream_blocks(model, "max", torch.device("cpu"))
    if recompute:
        recompute_blocks(model)
    slots = {slot.untyped_storage().data_ptr() for slot in model_ring(model).slots}
    img, *rest = inputs()
    output = model(img.requires_grad_(True), *rest)
    assert not {t.untyped_storage().data_ptr() for t in saved_tensors(output.grad_fn)} & slots


def model_ring(model):
    return next(m for m in model.modules() if isinstance(m, Streamed)).ring


def saved_tensors(node, seen=None):
    """Tensors that the autograd graph keeps behind `node`, but for those packed by hooks."""
    seen = set() if seen is None else seen
    if node is None or node in seen:
        return
    seen.add(node)
    for name in dir(node):
        if name.startswith("_raw_saved_"):
            kept = getattr(node, name)
            for value in kept if isinstance(kept, tuple) else (kept,):
                with suppress(RuntimeError):
                    if isinstance(value.data, torch.Tensor):
                        yield value.data
    for parent, _ in node.next_functions:
        yield from saved_tensors(parent, seen)


def test_device_holds_only_the_ring():
    """Every streamed tensor is a view of one of two slots or of its slab; no third copy exists."""
    model = build()
    count = stream_blocks(model, "max", torch.device("cpu"))
    assert count == 8
    streamed = [m for m in model.modules() if isinstance(m, Streamed)]
    ring = streamed[0].ring
    with torch.no_grad():
        model(*inputs())
    homes = {t.untyped_storage().data_ptr() for t in (*ring.slots, *(slab.memory for slab in ring.slabs))}
    assert len(ring.slots) == 2
    for block in streamed:
        held = (p for name, p in block.named_parameters() if "mod" not in name)
        assert {p.untyped_storage().data_ptr() for p in held} <= homes


def test_each_block_is_copied_once_per_pass_and_the_turn_is_free(monkeypatch):
    copies = []
    start = ThreadCopier.start

    def count(self, target, source):
        copies.append(source.data_ptr())
        start(self, target, source)

    monkeypatch.setattr(ThreadCopier, "start", count)
    model = build()
    stream_blocks(model, "max", torch.device("cpu"))
    train(model, recompute=True)
    # Three times forth and back: 8 blocks first, then 6 each way, as both ends of the way stay in the ring.
    assert len(copies) == 8 + 5 * 6


def test_slab_holds_frozen_tensors_only():
    block = build().single_blocks[0]
    block.linear1.bias.requires_grad_(True)
    slab = Slab(block)
    names = {piece.name for piece in slab.pieces if piece.module is block.linear1}
    assert names == {"weight"}
    assert all(piece.offset % 256 == 0 for piece in slab.pieces)


@pytest.mark.parametrize(
    ("total", "count", "expected"), [(38, 3, [0, 12, 25]), (4, 9, [0, 1, 2, 3]), (19, 0, [])]
)
def test_streamed_blocks_are_spread(total, count, expected):
    assert streamed_indices(total, count) == expected


@pytest.mark.parametrize("mode", ["fp8_fast", "int8", "nf4"])
@pytest.mark.parametrize("recompute", [True, False])
def test_weights_in_few_bits(tiny_files, slow_copies, mode, recompute):
    """Rounded weights and their scales travel in the same slab, and autograd finds both again."""

    def loaded():
        return load_transformer(tiny_files.dit, device="cpu", dtype=torch.float32, quantization=mode)

    model, device = loaded(), torch.device("cpu")
    stream_blocks(model, "max", device)
    assert any(piece.dtype in (FP8, torch.int8, torch.uint8) for piece in model_ring(model).slabs[0].pieces)
    streamed, resident = (train(m, recompute=recompute, given=tiny_inputs()) for m in (model, loaded()))
    assert torch.equal(streamed, resident) and streamed.any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", [None, "fp8_scaled", "fp8_fast", "int8_fast", "nf4"])
@pytest.mark.parametrize("recompute", [True, False])
def test_on_a_gpu(tiny_files, mode, recompute):
    device = torch.device("cuda")
    kept = {"fp8_fast": FP8, "int8_fast": torch.int8}.get(mode)
    if kept and not supported(device, kept):
        pytest.skip(f"this GPU has no products of {kept}")

    def loaded():
        return load_transformer(tiny_files.dit, device=device, dtype=torch.float32, quantization=mode)

    model, given = loaded(), [tensor.to(device) for tensor in tiny_inputs()]
    stream_blocks(model, "max", device)
    streamed, resident = (train(m, recompute=recompute, given=given) for m in (model, loaded()))
    assert torch.equal(streamed, resident) and streamed.any()


def tiny_inputs():
    """Of the model in `tiny_files`: 6 image tokens, 3 text tokens."""
    g = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, 6, 64, generator=g),
        torch.zeros(1, 6, 3),
        torch.randn(2, 3, tiny.CONTEXT_WIDTH, generator=g),
        torch.zeros(1, 3, 3),
        torch.rand(2, generator=g),
        torch.randn(2, tiny.VECTOR_WIDTH, generator=g),
        torch.ones(2),
    )
