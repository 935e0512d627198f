import pytest
import torch
from torch import Tensor

from kontext.data.batches import Batch
from kontext.errors import UserError
from kontext.training.example import Example, pack


def example(masks: Tensor | None) -> Example:
    draw = torch.Generator().manual_seed(0)
    batch = Batch(
        latents=torch.randn(2, 16, 4, 6, generator=draw).transpose(2, 3), masks=masks, keys=("a", "b"),
        references=(torch.randn(2, 16, 4, 4, generator=draw), torch.randn(2, 16, 2, 2, generator=draw)),
        txt=torch.randn(2, 3, 5, generator=draw).bfloat16(), vector=torch.randn(2, 7, generator=draw),
    )  # fmt: skip
    noise, u = torch.randn(2, 16, 6, 4, generator=draw), torch.rand(2, generator=draw, dtype=torch.float64)
    return Example(epoch=1, index=2, share=0.5, batch=batch, noise=noise, u=u)


@pytest.mark.parametrize("masks", [None, torch.rand(2, 1, 6, 4)])
def test_what_is_packed_comes_out_the_same(masks: Tensor | None) -> None:
    before = example(masks)
    parcel = pack([before, before])
    after, again = parcel.open()
    assert torch.equal(after.noise, again.noise) and after.noise.data_ptr() != again.noise.data_ptr()
    assert (after.epoch, after.index, after.share, after.batch.keys) == (1, 2, 0.5, ("a", "b"))
    pairs = [(before.noise, after.noise), (before.u, after.u)]
    pairs += [
        (getattr(before.batch, name), getattr(after.batch, name)) for name in ("latents", "txt", "vector")
    ]
    pairs += list(zip(before.batch.references, after.batch.references, strict=True))
    assert all(torch.equal(old, new) and old.dtype == new.dtype for old, new in pairs)
    assert (after.batch.masks is None) if masks is None else torch.equal(after.batch.masks, masks)
    data = parcel.data.untyped_storage().data_ptr()
    assert {t.untyped_storage().data_ptr() for t in (after.noise, after.u, after.batch.txt)} == {data}


def test_levels_stay_on_the_host() -> None:
    moved = example(None).to(torch.device("meta"))
    assert moved.noise.is_meta and moved.batch.references[1].is_meta and not moved.u.is_meta


def test_an_error_comes_behind_what_was_loaded() -> None:
    examples = pack([example(None)], UserError("gone")).open()
    assert next(examples).index == 2
    with pytest.raises(UserError, match="gone"):
        next(examples)
