import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from kontext.data.batches import Batches, choose_caption, open_batches
from kontext.data.cache import read_header, read_text
from kontext.data.captions import CaptionKeys, captions_of
from kontext.data.items import Item, Skips
from tests.data.folders import dataset_file, pairs
from tests.data.test_batches import fill


def captions(text: str, **keys: object) -> tuple[str, ...]:
    return captions_of([text], CaptionKeys(**keys), Path("a.png"))


@pytest.mark.parametrize(
    ("text", "keys", "expected"),
    [
        ("one\ntwo", {}, ("one\ntwo",)),
        ("one\n\n two \none", {"multiple_captions": True}, ("one", "two")),
        ("", {"multiple_captions": True}, ("",)),
        ("make it red", {"trigger_word": "ohwx"}, ("ohwx, make it red",)),
        ("give ohwx a hat", {"trigger_word": "ohwx"}, ("give ohwx a hat",)),
        ("give [trigger] a hat", {"trigger_word": "ohwx"}, ("give ohwx a hat",)),
        ("", {"trigger_word": "ohwx"}, ("ohwx",)),
        ("a dog", {"caption_prefix": "photo of", "caption_suffix": "at night"}, ("photo of a dog at night",)),
    ],
)
def test_captions_from_words(text: str, keys: dict[str, object], expected: tuple[str, ...]) -> None:
    assert captions(text, **keys) == expected


def test_shuffling_keeps_the_first_tags_and_all_others() -> None:
    text = "girl, solo, hat, smile, sky"
    found = captions(text, shuffle_caption=True, keep_tokens=2, shuffle_variants=20, trigger_word="ohwx")
    assert found[0] == f"ohwx, {text}" and len(found) == 6  # all orders of three tags
    for caption in found:
        tags = caption.split(", ")
        assert tags[:3] == ["ohwx", "girl", "solo"] and sorted(tags[3:]) == ["hat", "sky", "smile"]
    few = captions(text, shuffle_caption=True, shuffle_variants=3)
    assert len(few) <= 3 and few == captions(text, shuffle_caption=True, shuffle_variants=3)


def test_the_choice_is_even_and_drops_at_its_rate() -> None:
    item = Item("a", Path("a.png"), "x", (), ("y", "z"), 0.25)
    seen = Counter(choose_caption(item, str(seed)) for seed in range(4000))
    assert {caption: count / 4000 for caption, count in seen.items()} == pytest.approx(
        {"": 0.25, "x": 0.25, "y": 0.25, "z": 0.25}, abs=0.03
    )
    assert choose_caption(Item("a", Path("a.png"), "x", ()), "any") == "x"


def vectors(batches: Batches, epochs: int) -> list[float]:
    count = len(batches.sizes(0))
    return [batches.load(epoch, i).vector.item() for epoch in range(epochs) for i in range(count)]


def test_training_meets_each_caption_and_the_empty_prompt(tmp_path: Path) -> None:
    path = pairs(tmp_path, "a")
    plain = vectors(_batches(path), 3)
    (tmp_path / "img" / "a.txt").write_text("red\nblue\n")
    keys = {"multiple_captions": True, "control_directory": tmp_path / "ctl"}
    path = dataset_file(tmp_path, "resolution = 64\ncaption_dropout_rate = 0.3", **keys)
    batches = _batches(path)
    (entry,) = batches.order(0)[0]
    header = read_header(entry.text)
    assert header and header.captions == ("red", "blue", "")
    value = {caption: float(sum(map(ord, caption))) for caption in header.captions}
    assert {c: read_text(entry.text, c).vector.item() for c in header.captions} == value
    assert read_text(entry.text).vector.item() == value["red"]
    found = vectors(batches, 40)
    assert set(found) == set(value.values()) and set(plain) & set(found) == set()
    assert vectors(_batches(path), 40) == found and vectors(_batches(path, seed=2), 40) != found


def test_training_meets_the_captions_of_several_files(tmp_path: Path) -> None:
    """a has both kinds of file, b one of them; so it is with a list in JSONL."""
    pairs(tmp_path, "ab")
    for name, text in (("a.txt", "red"), ("a.short.txt", "blue"), ("b.txt", "green")):
        (tmp_path / "img" / name).write_text(text)
    path = dataset_file(tmp_path, caption_extension=["txt", ".short.txt"])
    rows = [("a", ["red", "blue"]), ("b", "green")]
    lines = [json.dumps({"image_path": f"{tmp_path}/img/{n}.png", "caption": text}) for n, text in rows]
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    keys = {"image_directory": None, "image_jsonl_file": tmp_path / "items.jsonl"}
    for file in (path, dataset_file(tmp_path, **keys, cache_directory=tmp_path / "other")):
        batches = _batches(file)
        seen: dict[str, set[float]] = {"a": set(), "b": set()}
        for epoch in range(20):
            for index in range(2):
                batch = batches.load(epoch, index)
                seen[batch.keys[0]].add(batch.vector.item())
        values = {text: float(sum(map(ord, text))) for text in ("red", "blue", "green")}
        assert seen == {"a": {values["red"], values["blue"]}, "b": {values["green"]}}


def _batches(path: Path, seed: int = 1) -> Batches:
    fill(path)
    return open_batches(path, seed=seed, skips=Skips())


def test_the_cache_is_stale_when_it_lacks_a_caption_alone(tmp_path: Path) -> None:
    general = "resolution = 64\nenable_bucket = true"
    pairs(tmp_path, "ab")
    with_dropout = dataset_file(tmp_path, f"{general}\ncaption_dropout_rate = 0.5")
    fill(with_dropout)
    without = dataset_file(tmp_path, general)
    assert _open(without).items_per_epoch == 2
    dataset_file(tmp_path, f'{general}\ntrigger_word = "ohwx"')
    with pytest.raises(Exception, match="2 of 2 text embeddings must be encoded .2 caption edited"):
        _open(without)


def _open(path: Path) -> Batches:
    return open_batches(path, seed=1, skips=Skips())


def test_validation_sees_the_first_caption(tmp_path: Path) -> None:
    path = pairs(tmp_path, "ab")
    held = f'\n[[validation]]\nimage_directory = "{tmp_path / "ctl"}"\ncaption_dropout_rate = 1.0\n'
    path.write_text(path.read_text() + held)
    for name in "ab":
        (tmp_path / "ctl" / f"{name}.txt").write_text("Z")
    fill(path)
    batches = open_batches(path, seed=0, skips=Skips(), part="validation")
    assert torch.equal(torch.tensor(vectors(batches, 1)), torch.full((2,), float(ord("Z"))))
