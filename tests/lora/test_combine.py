from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kontext.checkpoints import open_source
from kontext.errors import UserError
from kontext.lora.combine import combine, extract, reduce_dense, reduce_factors
from kontext.lora.deltas import Decomposed, Delta, Difference, LowRank, Target
from tests.lora.models import relative_error

SHAPES = {"a.weight": (30, 20), "b.weight": (30, 20)}


def low_rank(seed: int, rank: int, shape: tuple[int, int] = (30, 20)) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    return LowRank(
        torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator), 0.5
    )


def dense(change: LowRank) -> torch.Tensor:
    return change.scale * change.up @ change.down


def planned(*changes: object, name: str = "a.weight") -> dict:
    return {name: [(Delta(Target(name, 0, 30), change, "stem"), 1.0 + i) for i, change in enumerate(changes)]}


def best(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, float]:
    """By a full decomposition: the best approximation and its share of the squared norm."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    approximation = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return approximation.float(), (s[:rank].square().sum() / s.square().sum()).item()


def test_the_sum_is_exact_without_a_rank():
    a, b = low_rank(1, 3), low_rank(2, 4)
    ((module, reduced),) = combine(planned(a, b), SHAPES, None)
    assert module == "a" and reduced.change.rank == 7 and reduced.kept == 1.0
    torch.testing.assert_close(dense(reduced.change), dense(a) + 2.0 * dense(b))


@pytest.mark.parametrize("rank", [1, 4, 7])
def test_a_rank_gives_the_best_approximation(rank: int):
    a, b = low_rank(1, 3), low_rank(2, 5)
    ((_, reduced),) = combine(planned(a, b), SHAPES, rank)
    expected, kept = best(dense(a) + 2.0 * dense(b), rank)
    assert reduced.change.rank == rank
    assert relative_error(dense(reduced.change), expected) < 1e-5
    assert reduced.kept == pytest.approx(kept, abs=1e-5)


def test_a_rank_above_the_sums_changes_nothing():
    ((_, reduced),) = combine(planned(low_rank(1, 3)), SHAPES, 9)
    assert reduced.change.rank == 3


def test_full_differences_need_a_rank():
    full = Difference(dense(low_rank(1, 12)))
    with pytest.raises(UserError, match="stem is no plain LoRA .* Give --rank"):
        list(combine(planned(full), SHAPES, None))
    ((_, reduced),) = combine(planned(full, low_rank(2, 2)), SHAPES, 5)
    expected, kept = best(full.values + 2.0 * dense(low_rank(2, 2)), 5)
    assert relative_error(dense(reduced.change), expected) < 1e-5
    assert reduced.kept == pytest.approx(kept, abs=1e-5)


def test_dora_cannot_leave_its_base():
    """Only as it is: whole, alone, by row, at strength 1, at its rank."""
    dora, by_column = (Decomposed(low_rank(1, 2), torch.ones(shape)) for shape in ((30, 1), (1, 20)))
    half = {
        "a.weight": [
            (
                Delta(
                    Target("a.weight", 0, 15), Decomposed(low_rank(1, 2, (15, 20)), torch.ones(15, 1)), "stem"
                ),
                1.0,
            )
        ]
    }
    weaker = {"a.weight": [(planned(dora)["a.weight"][0][0], 0.5)]}
    for plan, rank in (
        (planned(dora), 1), (planned(dora, dora), None), (planned(dora, low_rank(2, 2)), None), (planned(by_column), None),
        (half, None), (weaker, None),
    ):  # fmt: skip
        with pytest.raises(UserError, match="stem is a DoRA, which depends on the weights .* --dit"):
            list(combine(plan, SHAPES, rank))
    ((_, reduced),) = combine(planned(dora), SHAPES, None)
    assert torch.equal(reduced.magnitude, dora.magnitude) and reduced.change.rank == 2


def test_large_matrices_are_reduced_nearly_as_well():
    torch.manual_seed(0)
    matrix = dense(low_rank(1, 24, (900, 700))) + 0.01 * torch.randn(900, 700)
    state = torch.get_rng_state()
    reduced = reduce_dense(matrix, 16)
    expected, kept = best(matrix, 16)
    assert relative_error(dense(reduced.change), expected) < 1e-3
    assert reduced.kept == pytest.approx(kept, abs=1e-5)
    assert torch.equal(torch.get_rng_state(), state)


def test_factors_and_dense_agree():
    change = low_rank(3, 10)
    one, other = reduce_factors(change, 4), reduce_dense(dense(change), 4)
    assert relative_error(dense(one.change), dense(other.change)) < 1e-5


@pytest.mark.parametrize("base", ["dit", "dit_sharded"])
def test_a_lora_out_of_two_checkpoints(tmp_path: Path, tiny_files, base: str):
    name = "single_blocks.1.linear1"
    change = low_rank(4, 3, (3 * 64 + 256, 64))
    weights = load_file(tiny_files.dit)
    weights[f"{name}.weight"] += dense(change)
    save_file(weights, tmp_path / "tuned.safetensors")
    source = open_source(getattr(tiny_files, base), "transformer")
    tuned = open_source(tmp_path / "tuned.safetensors", "transformer")
    ((module, reduced),) = extract(source, tuned, ["double_blocks.0.img_attn.qkv", name], 3)
    assert module == name and reduced.kept == pytest.approx(1.0, abs=1e-5)
    assert relative_error(dense(reduced.change), dense(change)) < 1e-4
    with pytest.raises(UserError, match="odd.weight is not in both"):
        list(extract(source, tuned, ["odd"], 3))
