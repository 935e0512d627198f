import os
from pathlib import Path

import pytest

from kontext.data import fingerprints
from kontext.data.fingerprints import is_unchanged, make_stamp, weights_fingerprint


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_stamp_notices_edits_and_only_edits(tmp_path: Path) -> None:
    path = write(tmp_path / "a", b"one")
    before = path.stat()
    stamp = make_stamp(before, b"one")
    assert is_unchanged(path, stamp)
    os.utime(path, ns=(0, 0))
    assert is_unchanged(path, stamp), "touched"
    path.unlink()
    assert is_unchanged(write(path, b"one"), stamp), "copied anew"
    assert not is_unchanged(write(path, b"longer"), stamp)
    write(path, b"two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not is_unchanged(path, stamp), "same size and modification time"


def test_unchanged_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a", b"one")
    stamp = make_stamp(path.stat(), b"one")
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("read"))
    assert is_unchanged(path, stamp)


def test_weights_and_settings_count(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", b"1" * 100), write(tmp_path / "b", b"2" * 100)
    prints = {
        weights_fingerprint([a], ""),
        weights_fingerprint([a], "fp8"),
        weights_fingerprint([b], ""),
        weights_fingerprint([a, b], ""),
        weights_fingerprint([b, a], ""),
    }
    assert len(prints) == 5
    assert weights_fingerprint([write(tmp_path / "c", b"1" * 100)], "") == weights_fingerprint([a], "")


def test_large_weights_are_sampled_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "WHOLE", 1000)
    data = bytearray(10**6)
    whole = weights_fingerprint([write(tmp_path / "a", data)], "")
    for place in (0, 70_000, 500_001, 999_999):
        changed = data.copy()
        changed[place] = 1
        assert weights_fingerprint([write(tmp_path / "a", changed)], "") != whole
    assert weights_fingerprint([write(tmp_path / "a", data + b"0")], "") != whole
