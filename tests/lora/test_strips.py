import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kontext.checkpoints.source import Entry, read_header
from kontext.lora.deltas import (
    Change,
    Decomposed,
    Delta,
    Difference,
    Hadamard,
    Kronecker,
    LowRank,
    Replacement,
    Swapped,
    Target,
)
from kontext.lora.merge import merge_weight
from kontext.lora.stream import Spec, Writer
from kontext.lora.strips import Desk, by_rows, in_float32, in_threads, merge_strip, strips

ROWS, COLUMNS = 12, 5


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


LOW_RANK = LowRank(random(2, COLUMNS), random(ROWS, 2), 0.5)
CHANGES = {
    "low rank": LOW_RANK,
    "hadamard": Hadamard(random(ROWS, 2), random(2, COLUMNS), random(ROWS, 3), random(3, COLUMNS), 0.3),
    "difference": Difference(random(ROWS, COLUMNS)),
    "replacement": Replacement(random(ROWS, COLUMNS)),
    "decomposed": Decomposed(LOW_RANK, random(ROWS, 1).abs()),
}
WHOLE = {
    "kronecker": Kronecker(random(3, 1), random(4, COLUMNS), 1.0),
    "decomposed by column": Decomposed(LOW_RANK, random(1, COLUMNS).abs()),
    "swapped": Swapped(LOW_RANK),
}


def entries(path: Path, *heights: int) -> list[Entry]:
    """A file of one tensor for each height."""
    tensors = {f"old{i}": random(height, COLUMNS) + i for i, height in enumerate(heights)}
    save_file(tensors, path)
    found, _ = read_header(path)
    return [found[name] for name in tensors]


def specs(*heights: int, dtype: torch.dtype = torch.float32) -> list[Spec]:
    return [Spec(f"new{i}", dtype, (height, COLUMNS)) for i, height in enumerate(heights)]


def test_strips_end_where_a_tensor_ends(tmp_path: Path):
    old, new = entries(tmp_path / "a.safetensors", 6, 6), specs(9, 3)
    found = list(strips(old, new, 4 * COLUMNS))
    assert [(s.start, s.stop) for s in found] == [(0, 4), (4, 6), (6, 9), (9, 12)]
    assert [(s.old.name, s.old_row) for s in found] == [("old0", 0), ("old0", 4), ("old1", 0), ("old1", 3)]
    assert [(s.new.key, s.new_row) for s in found] == [("new0", 0), ("new0", 4), ("new0", 6), ("new1", 0)]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strips_equal_the_whole(tmp_path: Path, change: Change, dtype: torch.dtype):
    part = Delta(Target("x", 3, 6), LowRank(random(1, COLUMNS), random(3, 1), 2.0), "x")
    changes = [(Delta(Target("x", 0, ROWS), change, "x"), 0.7), (part, -1.0)]
    assert by_rows(changes)
    old, new = entries(tmp_path / "a.safetensors", 6, 6), specs(9, 3, dtype=dtype)
    writer, desk = Writer(tmp_path / "b.safetensors", new, {}), Desk()
    for strip in strips(old, new, 4 * COLUMNS):
        merge_strip(strip, in_float32(changes), writer, desk, torch.device("cpu"))
    found = load_file(tmp_path / "b.safetensors")
    whole = merge_weight(torch.cat(list(load_file(tmp_path / "a.safetensors").values())), changes)
    torch.testing.assert_close(torch.cat([found["new0"], found["new1"]]), whole.to(dtype))


@pytest.mark.parametrize("change", WHOLE.values(), ids=WHOLE)
def test_what_needs_the_whole_weight(change: Change):
    assert not by_rows([(Delta(Target("x", 0, ROWS), change, "x"), 1.0)])


def test_rows_are_copied_to_the_bit(tmp_path: Path, monkeypatch):
    (old,) = entries(tmp_path / "a.safetensors", 8)
    for direct in (True, False):
        if not direct:
            monkeypatch.delattr("os.copy_file_range", raising=False)
        writer = Writer(tmp_path / "b.safetensors", specs(3), {"a": "b"})
        writer.copy("new0", old, row=1, from_row=5, rows=2)
        found = load_file(tmp_path / "b.safetensors")["new0"]
        assert torch.equal(found[1:], random(8, COLUMNS)[5:7]) and not found[0].any()


def test_the_first_error_ends_the_work():
    made, gate = [], threading.Event()

    def tasks():
        for i in range(1000):
            made.append(i)
            yield fail if i == 3 else gate.set

    def fail():
        gate.wait()
        raise OSError(28, "No space left on device")

    before = torch.get_num_threads()
    with pytest.raises(OSError, match="No space left"):
        in_threads(tasks())
    assert len(made) < 100
    assert torch.get_num_threads() == before
