"""Files are in the page cache before they are asked for."""

import os
import subprocess
import sys
from pathlib import Path
from queue import SimpleQueue

import pytest

from kontext import readahead
from kontext.options.generate import Generate
from kontext.options.train import Train
from kontext.readahead import CHUNK, Piece, read_ahead

pytestmark = pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="only Linux tells what is cached")
SIZE = 3 * CHUNK + 5000


def written(path: Path, size: int = SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    return path


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached(path: Path) -> list[bool]:
    """Whether each chunk is in memory: its last byte can be had without waiting for the disk."""
    ends = [min(at + CHUNK, path.stat().st_size) for at in range(0, path.stat().st_size, CHUNK)]
    with open(path, "rb") as file:
        return [in_memory(file.fileno(), end - 1) for end in ends]


def in_memory(descriptor: int, place: int) -> bool:
    try:
        return bool(os.preadv(descriptor, [bytearray(1)], place, os.RWF_NOWAIT))
    except OSError:
        return False


def finished(paths: list[Path]) -> None:
    for thread in read_ahead(paths):
        thread.join()


def test_a_cold_file_gets_warm(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors")
    forget(path)
    if any(cached(path)):
        pytest.skip("this file system lives in memory")
    finished([path])
    assert cached(path) == [True] * 4


def test_order_folders_and_room(tmp_path: Path) -> None:
    """Files in the order given and once each, folders sorted, no more than there is room for."""
    single = written(tmp_path / "b.safetensors")
    shards = [written(tmp_path / "t5" / f"{n}.safetensors", CHUNK + 1) for n in (1, 2)]
    part = written(tmp_path / "pipeline" / "vae" / "model.safetensors", 10)
    written(tmp_path / "t5" / "notes.txt", 10)
    given = [single, tmp_path / "t5", tmp_path / "missing", tmp_path / "pipeline", single]
    pieces = readahead._pieces(given, 100 * CHUNK)
    expected = [(single, n * CHUNK) for n in range(4)]
    expected += [(shard, start) for shard in shards for start in (0, CHUNK)] + [(part, 0)]
    assert pieces == expected
    assert readahead._pieces(given, 2 * CHUNK + 1) == expected[:2]


def test_all_of_every_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By several readers at once, each of which keeps a file open."""
    files = [written(tmp_path / f"{n}.safetensors", 20 * CHUNK + n) for n in range(3)]
    read, sendfile = [], os.sendfile

    def watch(out: int, descriptor: int, offset: int, count: int) -> int:
        done = sendfile(out, descriptor, offset, count)
        read.append((os.fstat(descriptor).st_ino, offset, done))
        return done

    monkeypatch.setattr(os, "sendfile", watch)
    finished(files)
    for file in files:
        inode, place = file.stat().st_ino, 0
        for offset, done in sorted(piece[1:] for piece in read if piece[0] == inode and piece[2]):
            assert offset == place
            place += done
        assert place == file.stat().st_size


def test_files_that_vanish_are_left_to_the_loading(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors")
    pieces: SimpleQueue[Piece] = SimpleQueue()
    for piece in readahead._pieces([path], 100 * CHUNK):
        pieces.put(piece)
    path.unlink()
    readahead._read(pieces)
    finished([path])


def test_it_begins_before_torch_is_imported(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom kontext import cli\n"
        "def read_ahead(paths):\n"
        "    print([str(path) for path in paths], 'torch' in sys.modules)\n    raise SystemExit(0)\n"
        "cli.read_ahead = read_ahead\n"
        "cli.main(['generate', '--prompt', 'x', '--dit', 'd', '--vae', 'v', '--text-encoder1', 't', '--text-encoder2', 'c'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "['v', 't', 'c', 'd'] False\n", done.stderr


def test_only_what_is_sure_to_be_loaded(tmp_path: Path) -> None:
    """Training reads the encoders for sample pictures alone; the other way round for latents that are decoded."""
    files = {"vae": Path("v"), "text_encoder1": Path("t"), "text_encoder2": Path("c"), "dit": Path("d")}
    train = {"output_dir": tmp_path, "output_name": "x", "dataset_config": tmp_path / "d.toml", **files}
    assert Train(**train).weights() == (Path("d"),)
    sampled = Train(**train, sample_prompts=tmp_path / "p.txt")
    assert sampled.weights() == (Path("v"), Path("t"), Path("c"), Path("d"))
    assert Generate(**files, latent_path=[tmp_path / "l"]).weights() == (Path("v"),)
    assert Generate(**files, save_merged_model=tmp_path / "m").weights() == ()
