"""Caching and generation shared by two processes."""

from pathlib import Path
from typing import Any

from PIL import Image

from kontext.cli import main
from tests.data.folders import pairs
from tests.launch import launch, written


def latents(path: Path, files: Any) -> list[object]:
    return ["cache-latents", "--dataset-config", path, "--vae", files.vae, "--device", "cpu"]


def row(shown: str) -> list[str]:
    """The numbers of the summary: items, written, up to date, deleted."""
    lines = [[cell.strip() for cell in line.split("│")] for line in shown.splitlines()]
    return next(cells[2:6] for cells in lines if len(cells) == 7 and cells[1].endswith("/img"))


def test_a_cache_is_filled_by_two_and_each_file_written_once(tmp_path: Path, tiny_files: Any) -> None:
    path = pairs(tmp_path, "az")
    assert main([str(word) for word in latents(path, tiny_files)]) == 0
    for folder in ("img", "ctl"):
        (tmp_path / folder / "z.png").unlink()
    pairs(tmp_path, "abcdefg")
    damaged = tmp_path / "ctl" / "c.png"  # of the second process, as the next one
    damaged.write_bytes(damaged.read_bytes()[:2000])
    Image.new("RGBA", (64, 48), (1, 2, 3, 4)).save(tmp_path / "ctl" / "e.png")
    (code, shown), (other_code, other_shown) = launch(tmp_path / "run", *latents(path, tiny_files)).ended()
    assert code == other_code == 0, shown + other_shown
    assert row(shown) == ["7", "5", "1", "1"] and other_shown == ""
    assert "damaged or cut short" in shown and "transparency laid on white: 1 pictures" in shown
    assert [[name[0] for name in names] for names in written(tmp_path / "run")] == [
        ["b", "d", "f"],
        ["e", "g"],
    ]
    assert {cache.name[0] for cache in (tmp_path / "cache").iterdir()} == set("abdefg")


def test_an_error_or_a_death_of_one_ends_both(tmp_path: Path, tiny_files: Any) -> None:
    whole = pairs(tmp_path / "whole", "abcd")
    path = pairs(tmp_path, "abcd")
    damaged = tmp_path / "ctl" / "b.png"
    damaged.write_bytes(damaged.read_bytes()[:2000])
    strict = launch(tmp_path / "strict", *latents(path, tiny_files), "--strict")
    killed = launch(tmp_path / "killed", *latents(whole, tiny_files), killed=1)
    (code, shown), (other_code, other_shown) = strict.ended()
    assert code == other_code == 2
    assert "Another process has ended before its work was done" in shown and "written" not in shown
    assert other_shown.startswith("error (process 1): ") and "ctl/b.png: damaged" in other_shown
    (code, shown), (other_code, _) = killed.ended()
    assert code == 2 and "Another process has ended" in shown and other_code == -9
    assert [[name[0] for name in names] for names in written(tmp_path / "killed")] == [["a", "c"], []]


def generate(files: Any, root: Path, *more: object) -> list[object]:
    models = {
        "dit": files.dit, "vae": files.vae, "text-encoder1": files.t5, "text-encoder2": files.clip,
        "tokenizer1": files.t5_tokenizer, "tokenizer2": files.clip_tokenizer, "from-file": root / "prompts.txt",
    }  # fmt: skip
    given = [word for name, value in models.items() for word in (f"--{name}", value)]
    settings = "--device cpu --dtype float32 --t5-max-length 16 --infer-steps 1 --image-size 64 64 --seed 7"
    return ["generate", *given, *settings.split(), "--output-name", "x", *more]


def test_pictures_are_made_by_two_as_by_one(tmp_path: Path, tiny_files: Any) -> None:
    """The same names and bytes; what one could not make, the first tells, and the launch fails."""
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "prompts.txt").write_text(f"red\nblue --ci {tmp_path / 'bad.png'}\ngreen --d 3\nblack\n")
    run = launch(tmp_path / "two", *generate(tiny_files, tmp_path, "--save-path", tmp_path / "two"))
    alone = generate(tiny_files, tmp_path, "--save-path", tmp_path / "one")
    assert main([str(word) for word in alone]) == 2
    (code, shown), (other_code, other_shown) = run.ended()
    assert (code, other_code) == (2, 0) and other_shown == ""
    assert "1 of 4 pictures could not be made" in shown and "bad.png" in shown
    assert written(tmp_path / "two") == [["x_001.png", "x_003.png"], ["x_004.png"]]
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
