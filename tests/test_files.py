"""Output files are complete or absent."""

import errno
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from kontext import files
from kontext.errors import UserError
from kontext.files import atomic_folder, atomic_write, save_tensors


def test_the_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == path.parent and not path.exists()
    assert path.read_text() == "new" and os.listdir(path.parent) == ["a.txt"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_failure_keeps_the_old_file_and_leaves_nothing_else(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(failure), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise failure
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_name_of_the_longest_length_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    with atomic_write(path) as temporary:
        temporary.write_text("x")
    assert path.read_text() == "x"


def test_a_full_disk_is_named_with_the_file_and_spares_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(UserError) as caught, atomic_write(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(caught.value) == (
        f"Cannot write {path}: No space left on device. The file that was there before is unchanged."
    )
    assert path.read_text() == "old"


def test_a_full_disk_while_writing_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, metadata: object) -> Iterator[bytes]:
        yield b"half"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "a.safetensors"
    save_tensors(path, {"x": torch.ones(2)})
    before = path.read_bytes()
    monkeypatch.setattr(files, "pieces", full)
    with pytest.raises(UserError, match="a.safetensors: .*No space left on device.*is unchanged"):
        save_tensors(path, {"x": torch.zeros(2)})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it is a folder"), atomic_write(tmp_path):
        raise AssertionError("the block must not run")
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="Cannot write .*file/below"),
        atomic_write(tmp_path / "file" / "below"),
    ):
        raise AssertionError("the block must not run")


def test_tensors_and_metadata_read_back(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    weight = torch.arange(6.0).reshape(2, 3)
    metadata = {"b": 'quote " and é\n猫', "a": "\x00\x7f"}
    save_tensors(path, {"t": weight.T, "w": weight.bfloat16().requires_grad_()}, metadata)
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata
        assert torch.equal(file.get_tensor("t"), weight.T)
        assert torch.equal(file.get_tensor("w"), weight.bfloat16())


def test_the_same_content_gives_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    script = (
        "import sys, torch; from kontext.files import save_tensors;"
        "save_tensors(sys.argv[1], {n: torch.ones(3) for n in 'cab'}, {f'key{i}': 'é' for i in range(20)})"
    )
    digests = set()
    for name in ("one", "two"):
        subprocess.run([sys.executable, "-c", script, str(tmp_path / name)], check=True)
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1


def test_a_folder_is_not_put_in_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(UserError, match="it is a file"), atomic_folder(tmp_path / "a"):
        raise AssertionError("nothing is to be written")
    assert os.listdir(tmp_path) == ["a"]
