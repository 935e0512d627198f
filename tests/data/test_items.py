import json
from pathlib import Path

import pytest

from kontext.data.config import load_datasets
from kontext.data.items import Item, Skips, list_items, match_controls, unique_keys
from kontext.errors import UserError
from tests.data.folders import dataset_file, pairs


def listed(path: Path, skips: Skips | None = None) -> list[Item]:
    return list(list_items(load_datasets(path)[0], skips or Skips()))


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(f"caption of {name}" if name.endswith(".txt") else "x")


def jsonl(root: Path, *rows: dict[str, object] | str) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (root / "items.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return dataset_file(root, image_directory=None, image_jsonl_file=root / "items.jsonl")


def test_pairs_of_folders(tmp_path: Path) -> None:
    items = listed(pairs(tmp_path, "ba"))
    assert [item.key for item in items] == ["a", "b"]
    assert items[0] == Item("a", tmp_path / "img/a.png", "make a red", (tmp_path / "ctl/a.png",))


def test_only_pictures_of_the_folder_itself_count(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path / "img", "b.JPG", "b.txt", "a.webp", "a.txt", "c.heic", "d.npz", ".e.png", "e.txt")
    touch(tmp_path / "img" / "deeper", "f.png", "f.txt")
    assert [item.key for item in listed(dataset_file(tmp_path))] == ["a", "b"]
    assert "c.heic not read" in capfd.readouterr().err


def test_captions(tmp_path: Path) -> None:
    touch(tmp_path / "img", "a.png", "b.png", "c.png", "d.png")
    (tmp_path / "img" / "a.caption").write_bytes(b"\xef\xbb\xbf  two\nlines \n")
    (tmp_path / "img" / "b.caption").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "img" / "d.caption").write_text("")
    skips = Skips()
    items = listed(dataset_file(tmp_path, caption_extension="caption"), skips)
    assert [(item.key, item.caption) for item in items] == [("a", "two\nlines"), ("d", "")]
    assert [(Path(row.name).name, row.reason) for row in skips.rows] == [
        ("b.png", "the caption b.caption is not UTF-8 text"),
        ("c.png", "no caption: there is no c.caption beside it"),
    ]


def test_no_caption_file_of_several(tmp_path: Path) -> None:
    touch(tmp_path / "img", "a.png", "a.b.txt", "b.png")
    skips = Skips()
    (item,) = listed(dataset_file(tmp_path, caption_extension=[".txt", ".b.txt"]), skips)
    assert item.caption == "caption of a.b.txt"
    assert skips.rows[0].reason == "no caption: there is no b.txt or b.b.txt beside it"


def test_strict_stops_at_the_first_missing_caption(tmp_path: Path) -> None:
    touch(tmp_path / "img", "a.png", "b.png", "b.txt")
    with pytest.raises(UserError, match=r"a\.png: no caption.*--strict"):
        listed(dataset_file(tmp_path), Skips(strict=True))


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    touch(tmp_path / "img", "a.txt")
    with pytest.raises(UserError, match=r"img: there are no pictures in it"):
        listed(dataset_file(tmp_path))
    touch(tmp_path / "img", "b.png", "c.png")
    with pytest.raises(UserError, match=r"all 2 pictures were skipped, first .*b.png: no caption"):
        listed(dataset_file(tmp_path))


def match(images: str, controls: str) -> tuple[dict[str, list[str]], list[str]]:
    found, lonely = match_controls([Path(n) for n in images.split()], [Path(n) for n in controls.split()])
    return {image.name: [c.name for c in files] for image, files in found.items()}, [c.name for c in lonely]


def test_references_in_order_of_their_number() -> None:
    found, lonely = match("a.png", "a_10.jpg a_2.png a.webp a_0.png")
    assert found == {"a.png": ["a.webp", "a_0.png", "a_2.png", "a_10.jpg"]} and not lonely


def test_longest_name_takes_the_reference() -> None:
    found, lonely = match("a.png a_1.png a_10.png", "a.png a_1.png a_1_0.png a_10.png a_2.png b.png ab.png")
    assert found == {
        "a.png": ["a.png", "a_2.png"],
        "a_1.png": ["a_1.png", "a_1_0.png"],
        "a_10.png": ["a_10.png"],
    }
    assert lonely == ["b.png", "ab.png"]


def test_names_with_dots_and_equal_stems() -> None:
    assert match("v1.2.png", "v1.2.jpg v1.2_0.png")[0] == {"v1.2.png": ["v1.2.jpg", "v1.2_0.png"]}
    assert match("a.png a.jpg", "a.webp")[0] == {"a.png": ["a.webp"], "a.jpg": ["a.webp"]}


@pytest.mark.parametrize("name", ["a_mask.png", "a_².png", "a.b.png"])
def test_references_without_number_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="cannot tell which reference of a this is"):
        match("a.png", f"a.png {name}")


def test_target_without_reference_is_an_error(tmp_path: Path) -> None:
    path = pairs(tmp_path, "abcdefgh")
    for name in "bcdefgh":
        (tmp_path / "ctl" / f"{name}.png").unlink()
    with pytest.raises(UserError, match=r"no reference for b.png, c.png, d.png, e.png, f.png and 2 more"):
        listed(path)


def test_reference_without_target_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = pairs(tmp_path, "ab")
    (tmp_path / "ctl" / "z.png").write_text("x")
    assert len(listed(path)) == 2
    assert "z.png not used" in capfd.readouterr().err


def test_unique_keys() -> None:
    assert unique_keys(["a", "b", "a", "A", "a"]) == ["a", "b", "a~2", "A~3", "a~4"]
    assert unique_keys(["a", "a", "a~2"]) == ["a", "a~3", "a~2"]


def test_same_name_with_two_extensions(tmp_path: Path) -> None:
    touch(tmp_path / "img", "a.png", "a.jpg", "a.txt")
    items = listed(dataset_file(tmp_path))
    assert [(item.key, item.image.name) for item in items] == [("a", "a.jpg"), ("a~2", "a.png")]


def test_jsonl(tmp_path: Path) -> None:
    items = listed(
        jsonl(
            tmp_path,
            {"image_path": "x/a.png", "caption": " red\u2028sky ", "control_path": "y/a.png", "author": "me"},
            {"image_path_0": "a.png", "caption": "2", "control_path_10": "k10", "control_path_2": "k2"},
            "",
            {"image_path": "c.png", "caption": "3", "control_path": None},
        )
    )
    assert items == [
        Item("a", Path("x/a.png"), "red\u2028sky", (Path("y/a.png"),)),
        Item("a~2", Path("a.png"), "2", (Path("k2"), Path("k10"))),
        Item("c", Path("c.png"), "3", ()),
    ]


def test_jsonl_without_caption_is_skipped(tmp_path: Path) -> None:
    skips = Skips()
    listed(jsonl(tmp_path, {"image_path": "a.png"}, {"image_path": "b.png", "caption": ""}), skips)
    assert [row.name for row in skips.rows] == [f"{tmp_path / 'items.jsonl'}:1"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"items\.jsonl:2: not a line of JSON"),
        ("[]", "an object with image_path"),
        ({"caption": "x"}, "must be texts"),
        ({"image_path": 3, "caption": "x"}, "must be texts"),
        ({"image_path": "b.png", "caption": ["x", 3]}, "must be texts"),
        ({"image_path": "b.png", "caption": "x", "contol_path": "c"}, "Did you mean control_path?"),
        ({"image_path": "b.png", "caption": "x", "control_path": ["c"]}, "must be a path"),
        ({"image_path_0": "b.png", "image_path_1": "c.png", "caption": "x"}, "one target per line"),
        ({"image_path": "b.png", "caption": "x"}, "no control_path in line 2,"),
    ],
)
def test_bad_lines(tmp_path: Path, row: dict[str, object] | str, message: str) -> None:
    first = {"image_path": "a.png", "caption": "x", "control_path": "c.png"}
    with pytest.raises(UserError, match=message):
        listed(jsonl(tmp_path, first, row))
