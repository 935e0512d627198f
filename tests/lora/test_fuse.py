import torch

from kontext.lora.deltas import Delta, Difference, LowRank, Target
from kontext.lora.fuse import fuse


def delta(rows: tuple[int, int], rank: int, seed: int, down: torch.Tensor | None = None) -> Delta:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, 5, generator=generator) if down is None else down
    up = torch.randn(rows[1] - rows[0], rank, generator=generator)
    return Delta(Target("x.weight", *rows), LowRank(down, up, 0.5), "x")


def dense(deltas: list[Delta], strengths: list[float], rows: int) -> torch.Tensor:
    total = torch.zeros(rows, 5)
    for d, s in zip(deltas, strengths, strict=True):
        total[d.target.start : d.target.stop] += s * 0.5 * d.change.up @ d.change.down
    return total


def test_ranks_add_up_and_rows_keep_their_places():
    deltas = [delta((0, 3), 2, 1), delta((3, 6), 4, 2), delta((0, 9), 1, 3)]
    fused = fuse(deltas, 9, [1.0, -2.0, 0.5])
    assert fused.rank == 7 and fused.scale == 1.0
    torch.testing.assert_close(fused.up @ fused.down, dense(deltas, [1.0, -2.0, 0.5], 9))


def test_a_shared_down_keeps_its_rank():
    down = torch.randn(3, 5)
    deltas = [delta((0, 3), 3, 1, down), delta((3, 6), 3, 2, down.clone())]
    fused = fuse(deltas, 9)
    assert fused.rank == 3
    torch.testing.assert_close(fused.up @ fused.down, dense(deltas, [1.0, 1.0], 9))


def test_a_single_whole_change_keeps_its_factors():
    whole = delta((0, 9), 2, 1)
    fused = fuse([whole], 9, [3.0])
    assert fused.up is whole.change.up and fused.down is whole.change.down and fused.scale == 1.5


def test_what_is_not_low_rank_cannot_be_fused():
    full = Delta(Target("x.weight", 0, 9), Difference(torch.zeros(9, 5)), "x")
    assert fuse([full, delta((0, 9), 2, 1)], 9) is None
