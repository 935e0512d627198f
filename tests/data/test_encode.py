from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from kontext.data.cache import read_header, read_latents, read_text
from kontext.data.encode import REMEMBERED, Loaded, RememberingEncoder, chunks, encode_latents, encode_texts
from kontext.data.fingerprints import Stamp
from kontext.data.items import Skips
from kontext.data.plan import Entry, plan_blocks
from kontext.errors import UserError
from tests.data.folders import dataset_file, pairs, picture, shrink


def planned(path: Path) -> list[Entry]:
    return [entry for block in plan_blocks(path, Skips()) for entry in block.entries]


class Counting:
    """`shrink` that remembers the shapes it was given."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.shapes.append(tuple(images.shape))
        return shrink(images)


def latents_of(path: Path, size: tuple[int, int]) -> Tensor:
    """Means of 8x8 pixels, in -1..1, of a picture that needs no resizing, by NumPy."""
    pixels = np.asarray(Image.open(path)).astype(np.float64) / 127.5 - 1
    width, height = size
    means = pixels.reshape(height // 8, 8, width // 8, 8, 3).mean((1, 3)).transpose(2, 0, 1)
    return torch.from_numpy(means).float()


@pytest.mark.parametrize("workers", [0, 2])
def test_latents_of_targets_and_references(tmp_path: Path, workers: int) -> None:
    entries = planned(pairs(tmp_path, "abc", size=(64, 64)))
    written = encode_latents(entries, shrink, encoder="e", batch_size=2, workers=workers, skips=Skips())
    assert [each.entry for each in written] == entries
    for entry in entries:
        back = read_latents(entry.latents)
        assert torch.allclose(back.target, latents_of(entry.item.image, (64, 64)), atol=1e-6)
        assert torch.allclose(back.references[0], latents_of(entry.item.controls[0], (64, 64)), atol=1e-6)
        header = read_header(entry.latents)
        assert header and header.record
        assert (header.record.encoder, header.record.dataset) == ("e", entry.dataset)
        assert [stamp.size for stamp in header.record.sources] == [p.stat().st_size for p in entry.sources]


def test_equal_sizes_share_batches_and_shared_pictures_are_encoded_once(tmp_path: Path) -> None:
    for index in range(5):
        picture(tmp_path / "img" / f"{index}.png", (64, 64) if index < 3 else (96, 32), index)
        (tmp_path / "img" / f"{index}.txt").write_text("x")
        picture(tmp_path / "ctl" / f"{index}.png", (64, 64), seed=99)
    path = dataset_file(tmp_path, control_directory=tmp_path / "ctl", no_resize_control=True)
    counting = Counting()
    entries = planned(path)
    list(encode_latents(entries, counting, encoder="e", batch_size=4, workers=0, skips=Skips()))
    assert sum(shape[0] for shape in counting.shapes) == 5 + 1
    wide = entries[3].target
    assert sorted(counting.shapes) == sorted([(2, 3, wide[1], wide[0]), (4, 3, 64, 64)])


def test_a_picture_may_be_its_own_reference(tmp_path: Path) -> None:
    path = pairs(tmp_path, "a")
    picture(tmp_path / "ctl" / "a.png")
    list(encode_latents(planned(path), shrink, encoder="e", batch_size=1, workers=0, skips=Skips()))
    back = read_latents(planned(path)[0].latents)
    assert torch.equal(back.target, back.references[0])


def test_unreadable_pictures_are_skipped_and_the_others_written(tmp_path: Path) -> None:
    path = pairs(tmp_path, "abc")
    entries = planned(path)
    damaged = tmp_path / "ctl" / "b.png"
    damaged.write_bytes(damaged.read_bytes()[:2000])
    skips = Skips()
    written = encode_latents(entries, shrink, encoder="e", batch_size=3, workers=0, skips=skips)
    assert [each.entry.item.key for each in written] == ["a", "c"]
    assert len(skips.rows) == 1 and "ctl/b.png: damaged or cut short" in skips.rows[0].reason
    with pytest.raises(UserError, match="ctl/b.png"):
        list(encode_latents(entries, shrink, encoder="e", batch_size=3, workers=0, skips=Skips(strict=True)))


def test_notes_tell_what_became_of_unusual_pictures(tmp_path: Path) -> None:
    path = pairs(tmp_path, "ab")
    Image.new("RGBA", (64, 48), (1, 2, 3, 4)).save(tmp_path / "ctl" / "a.png")
    first, second = encode_latents(planned(path), shrink, encoder="e", batch_size=1, workers=0, skips=Skips())
    assert first.notes == ((tmp_path / "ctl" / "a.png", "transparency laid on white"),) and second.notes == ()


def test_nan_names_the_item_and_is_not_cached(tmp_path: Path) -> None:
    entries = planned(pairs(tmp_path, "ab"))

    def broken(images: Tensor) -> Tensor:
        return shrink(images) * float("nan")

    with pytest.raises(UserError, match=r"img/a\.png: its latents contain NaN"):
        list(encode_latents(entries, broken, encoder="e", batch_size=1, workers=0, skips=Skips()))
    assert not list((tmp_path / "cache").glob("*"))


def test_the_memory_is_bounded() -> None:
    remembering = RememberingEncoder(shrink, 64)
    loaded = [
        Loaded(torch.full((3, 8, 8), i % 256, dtype=torch.uint8), Stamp(0, 0, 0, str(i)), ())
        for i in range(REMEMBERED + 40)
    ]
    latents = remembering(loaded)
    assert len(remembering.known) == REMEMBERED
    assert [round(float((each.fetched()[0, 0, 0] + 1) * 127.5)) for each in latents] == [
        i % 256 for i in range(REMEMBERED + 40)
    ]


def test_each_caption_is_encoded_once(tmp_path: Path) -> None:
    path = pairs(tmp_path, "abcde")
    (tmp_path / "img" / "d.txt").write_text("make a red")
    entries, calls = planned(path), []

    def encode(captions: list[str]) -> tuple[Tensor, Tensor]:
        calls.append(captions)
        values = torch.tensor([float(ord(caption[5])) for caption in captions])
        return values[:, None, None].expand(-1, 3, 2), values[:, None]

    written = list(encode_texts(entries, encode, encoder="e", batch_size=3))
    assert calls == [["make a red", "make b red", "make c red"], ["make e red"]]
    assert {entry.item.key for entry in written} == set("abcde")
    for entry in entries:
        text = read_text(entry.text)
        assert text.txt.shape == (3, 2) and text.vector.item() == ord(entry.item.caption[5])
        header = read_header(entry.text)
        assert header and header.captions == (entry.item.caption,)


def test_chunks() -> None:
    assert list(chunks("abcde", 2)) == [("a", "b"), ("c", "d"), ("e",)]
    assert list(chunks([], 2)) == []
