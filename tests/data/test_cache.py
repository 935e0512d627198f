import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kontext.data import cache
from kontext.data.cache import Latents, Record, Text
from kontext.data.fingerprints import Stamp
from kontext.errors import UserError

RECORD = Record("block", "encoder", (Stamp(1, 2, 3, "hash"), Stamp(4, 5, 6, "other")))


def latents(references: int = 1) -> Latents:
    return Latents(torch.randn(16, 4, 6), tuple(torch.randn(16, 2 + i, 8) for i in range(references)))


def write(path: Path, value: Latents, record: Record = RECORD) -> Path:
    cache.write_latents(path, value, size=(50, 40), record=record, source="a.png")
    return path


def musubi(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    """A file as musubi-tuner writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"architecture": "flux_kontext", "format_version": "1.0.1", **metadata})
    return path


def test_file_names() -> None:
    assert cache.latents_path(Path("c"), "a_b", (640, 12345)) == Path("c/a_b_0640x12345_fk.safetensors")
    assert cache.text_path(Path("c"), "a_b") == Path("c/a_b_fk_te.safetensors")
    assert cache.key_of(Path("c/a_b_0640x12345_fk.safetensors")) == "a_b"
    assert cache.key_of(Path("c/a_b_fk_te.safetensors")) == "a_b"


def test_latents_file_as_specified(tmp_path: Path) -> None:
    value = latents(3)
    path = write(tmp_path / "new" / "x.safetensors", value)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {
            "latents_1x4x6_float32",
            "latents_control_1x2x8_float32",
            "latents_control_1_1x3x8_float32",
            "latents_control_2_1x4x8_float32",
        }
        metadata = file.metadata()
    kept = json.loads(metadata.pop("kontext"))
    assert metadata == {
        "architecture": "flux_kontext",
        "format_version": "1.0.1",
        "width": "50",
        "height": "40",
    }
    assert kept["sources"][1] == {"size": 4, "modified": 5, "changed": 6, "content": "other"}


def test_latents_round_trip(tmp_path: Path) -> None:
    value = latents(12)
    path = write(tmp_path / "x.safetensors", value)
    back = cache.read_latents(path)
    assert torch.equal(back.target, value.target)
    assert len(back.references) == 12
    assert all(torch.equal(a, b) for a, b in zip(back.references, value.references, strict=True))
    header = cache.read_header(path)
    assert header and header.record == RECORD and header.shapes["latents"] == (16, 4, 6)


def test_text_round_trip(tmp_path: Path) -> None:
    value = Text(torch.randn(5, 7).bfloat16(), torch.randn(3))
    path = tmp_path / "x_fk_te.safetensors"
    cache.write_text(path, {"a\nb ü": value}, record=Record("block", "encoder"), source="a.png")
    back = cache.read_text(path)
    assert torch.equal(back.txt, value.txt) and torch.equal(back.vector, value.vector)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {"t5_vec_bfloat16", "clip_l_pooler_float32"}
    header = cache.read_header(path)
    assert header and header.captions == ("a\nb ü",) and header.record == Record("block", "encoder")


def test_files_of_musubi_are_read(tmp_path: Path) -> None:
    target, control = torch.randn(16, 4, 4), torch.randn(16, 6, 2)
    path = musubi(
        tmp_path / "a_0064x0064_fk.safetensors",
        {"latents_1x4x4_float32": target, "latents_control_1x6x2_float32": control},
        width="64",
        height="64",
    )
    back = cache.read_latents(path)
    assert torch.equal(back.target, target) and torch.equal(back.references[0], control)
    header = cache.read_header(path)
    assert header and header.record is None
    txt, vector = torch.randn(512, 8).bfloat16(), torch.randn(4).half()
    path = musubi(
        tmp_path / "a_fk_te.safetensors",
        {"t5_vec_bfloat16": txt, "clip_l_pooler_float16": vector},
        caption1="hi",
    )
    text = cache.read_text(path)
    assert torch.equal(text.txt, txt) and torch.equal(text.vector, vector)
    header = cache.read_header(path)
    assert header and header.captions == ("hi",)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("latents_1x8x16_float32", "latents"),
        ("latents_control_1x8x16_float8_e4m3fn", "latents_control"),
        ("latents_control_3_1x8x16_bfloat16", "latents_control_3"),
        ("t5_vec_bfloat16", "t5_vec"),
        ("clip_l_pooler_float16", "clip_l_pooler"),
        ("something_mask", "something_mask"),
    ],
)
def test_logical_names(key: str, name: str) -> None:
    assert cache.logical_name(key) == name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_never_cached(tmp_path: Path, value: float) -> None:
    bad = latents()
    bad.references[0][3, 1, 1] = value
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match=r"a\.png: its latents_control contain NaN"):
        write(path, bad)
    with pytest.raises(UserError, match=r"b\.png: its clip_l_pooler contain NaN"):
        text = Text(torch.zeros(2, 2), torch.tensor([value]))
        cache.write_text(path, {"": text}, record=RECORD, source="b.png")
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_foreign_files_have_no_header(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", latents())
    path.write_bytes(path.read_bytes()[:-10])
    assert cache.read_header(path) is None
    with pytest.raises(UserError, match=r"x\.safetensors: this cache file is missing or damaged"):
        cache.read_latents(path)
    path.write_bytes(b"")
    assert cache.read_header(path) is None
    save_file({"t5_vec_float32": torch.zeros(1)}, path, {"architecture": "wan"})
    assert cache.read_header(path) is None
    with pytest.raises(UserError, match="missing or damaged"):
        cache.read_text(tmp_path / "gone.safetensors")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"dataset": "", "encoder": "", "sources": [3]}'])
def test_unknown_record_counts_as_none(tmp_path: Path, text: str) -> None:
    path = musubi(tmp_path / "x.safetensors", {"latents_1x1x1_float32": torch.zeros(1, 1, 1)}, kontext=text)
    header = cache.read_header(path)
    assert header and header.record is None


def test_only_own_stale_files_are_deleted(tmp_path: Path) -> None:
    kept = write(tmp_path / "kept_0050x0040_fk.safetensors", latents())
    stale = write(tmp_path / "gone_0050x0040_fk.safetensors", latents())
    unreadable = write(tmp_path / "a_b_0001x0001_fk.safetensors", latents())
    others = [
        write(tmp_path / "other_0050x0040_fk.safetensors", latents(), Record("another", "encoder")),
        musubi(tmp_path / "m_0050x0040_fk.safetensors", {"latents_1x1x1_float32": torch.zeros(1, 1, 1)}),
        write(tmp_path / "lora.safetensors", latents()),
        write(tmp_path / "gone_fk_te.safetensors", latents()),
        write(tmp_path / "deeper" / "gone_0050x0040_fk.safetensors", latents()),
    ]
    (tmp_path / "broken_0050x0040_fk.safetensors").write_bytes(b"x")
    deleted = cache.delete_stale(tmp_path, "latents", dataset="block", keep=[kept], keep_keys=["a_b"])
    assert deleted == [stale] and not stale.exists()
    assert all(path.exists() for path in (kept, unreadable, *others))
    assert cache.delete_stale(tmp_path, "text", dataset="block", keep=[]) == [
        tmp_path / "gone_fk_te.safetensors"
    ]


def test_temporary_files_of_killed_runs_go(tmp_path: Path) -> None:
    old, new = tmp_path / ".kontext-1-ab.tmp", tmp_path / ".kontext-2-cd.tmp"
    for path in (old, new):
        path.write_bytes(b"half a file")
    os.utime(old, (time.time() - 7200,) * 2)
    cache.delete_stale(tmp_path, "latents", dataset="block", keep=[])
    assert not old.exists() and new.exists()
