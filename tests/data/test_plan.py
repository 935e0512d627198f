import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kontext.data.encode import encode_latents, encode_texts
from kontext.data.items import Skips
from kontext.data.plan import Entry, check_caches, plan_blocks
from kontext.errors import UserError
from tests.data.folders import dataset_file, pairs, picture, shrink


def planned(path: Path) -> list[Entry]:
    return [entry for block in plan_blocks(path, Skips()) for entry in block.entries]


def cached(path: Path, encoder: str = "e") -> None:
    entries = planned(path)
    list(encode_latents(entries, shrink, encoder=encoder, batch_size=2, workers=0, skips=Skips()))
    texts = encode_texts(
        entries, lambda c: (torch.ones(len(c), 3, 2), torch.ones(len(c), 2)), encoder=encoder, batch_size=2
    )
    list(texts)


def problem_of(path: Path, encoder: str | None = None) -> dict[str, str]:
    """Reasons by key; latents' before text's."""
    entries, found = planned(path), {}
    for kind in ("text", "latents"):
        for entry, status in zip(entries, check_caches(entries, kind, encoder=encoder), strict=True):
            if status.problem:
                found[entry.item.key] = status.problem
    return found


def test_entries_have_sizes_and_files(tmp_path: Path) -> None:
    path = pairs(tmp_path, "a", size=(300, 200))
    picture(tmp_path / "ctl" / "a.png", (100, 400))
    path = dataset_file(
        tmp_path,
        "resolution = 128\nenable_bucket = true",
        control_directory=tmp_path / "ctl",
        control_resolution=64,
    )
    (entry,) = planned(path)
    assert (entry.size, entry.target, entry.references) == ((300, 200), (160, 96), ((32, 128),))
    assert entry.latents == tmp_path / "cache/a_0300x0200_fk.safetensors"
    assert entry.text == tmp_path / "cache/a_fk_te.safetensors"


def test_pictures_that_cannot_be_opened_are_skipped(tmp_path: Path) -> None:
    path = pairs(tmp_path, "abc")
    (tmp_path / "img" / "a.png").write_bytes(b"")
    (tmp_path / "ctl" / "c.png").write_text("no picture")
    skips = Skips()
    (block,) = plan_blocks(path, skips)
    assert [entry.item.key for entry in block.entries] == ["b"] and block.unusable == {"a", "c"}
    assert "empty (0 bytes)" in skips.rows[0].reason and "ctl/c.png: is not a picture" in skips.rows[1].reason
    with pytest.raises(UserError, match=r"a\.png: is empty.*--strict"):
        plan_blocks(path, Skips(strict=True))
    (tmp_path / "img" / "b.png").write_bytes(b"")
    with pytest.raises(UserError, match="no picture can be used"):
        plan_blocks(path, Skips())


def test_new_then_up_to_date(tmp_path: Path) -> None:
    path = pairs(tmp_path)
    assert problem_of(path) == {"a": "new", "b": "new", "c": "new"}
    cached(path)
    assert problem_of(path) == problem_of(path, "e") == {}
    assert set(problem_of(path, "another").values()) == {"other weights or settings"}


def test_each_edit_is_noticed_at_its_item_alone(tmp_path: Path) -> None:
    path = pairs(tmp_path)
    cached(path)
    picture(tmp_path / "img" / "a.png", seed=7)
    picture(tmp_path / "ctl" / "b.png", seed=8)
    (tmp_path / "img" / "c.txt").write_text("another edit")
    assert problem_of(path) == {"a": "picture edited", "b": "picture edited", "c": "caption edited"}


def test_copied_dataset_stays_up_to_date(tmp_path: Path) -> None:
    path = pairs(tmp_path)
    cached(path)
    for file in (*(tmp_path / "img").iterdir(), *(tmp_path / "ctl").iterdir()):
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(data)
    assert problem_of(path) == {}


def test_other_resolution_and_other_references_are_noticed(tmp_path: Path) -> None:
    path = pairs(tmp_path, "ab")
    cached(path)
    other = dataset_file(
        tmp_path, "resolution = 48\nenable_bucket = true", control_directory=tmp_path / "ctl"
    )
    assert problem_of(other) == {"a": "other sizes", "b": "other sizes"}
    path = pairs(tmp_path, "ab")
    picture(tmp_path / "ctl" / "a_0.png")
    assert problem_of(path) == {"a": "other sizes"}


def test_damaged_caches_are_noticed(tmp_path: Path) -> None:
    path = pairs(tmp_path, "ab")
    cached(path)
    first, second = planned(path)
    first.latents.write_bytes(first.latents.read_bytes()[:-5])
    second.text.write_bytes(b"")
    assert problem_of(path) == {"a": "damaged cache file", "b": "damaged cache file"}


def test_files_of_musubi_count_while_nothing_is_newer(tmp_path: Path) -> None:
    path = pairs(tmp_path, "a", size=(64, 64))
    (entry,) = planned(path)
    entry.latents.parent.mkdir()
    meta = {"architecture": "flux_kontext", "format_version": "1.0.1"}
    latents = torch.zeros(2, 16, 8, 8)
    save_file(
        {"latents_1x8x8_float32": latents[0], "latents_control_1x8x8_float32": latents[1]},
        entry.latents,
        meta,
    )
    text = {"t5_vec_bfloat16": torch.zeros(512, 8).bfloat16(), "clip_l_pooler_float32": torch.zeros(4)}
    save_file(text, entry.text, {**meta, "caption1": "make a red"})
    assert problem_of(path, "ours") == {}
    later = entry.latents.stat().st_mtime + 5
    os.utime(tmp_path / "ctl" / "a.png", (later, later))
    assert problem_of(path, "ours") == {"a": "picture newer than its cache"}
