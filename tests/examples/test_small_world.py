"""Scenes, tokenizers and weights of the small world."""

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from small_world import scenes
from small_world.fit import DECAY, WARMUP, rate_at
from small_world.pictures import edit_error, to_bytes, to_image
from small_world.tokenizers import GRAMMAR, WORDS, write_clip_tokenizer, write_t5_tokenizer
from transformers import CLIPTokenizer, T5TokenizerFast

MODELS = Path(scenes.__file__).parent / "models"


def test_an_edit_is_a_function_of_its_seed() -> None:
    assert scenes.edit(5) == scenes.edit(5)
    assert scenes.draw(scenes.edit(5).target).tobytes() == scenes.draw(scenes.edit(5).target).tobytes()
    assert len({scenes.edit(seed).reference for seed in range(200)}) == 200


@pytest.mark.parametrize("kind", scenes.EDITS)
def test_every_edit_changes_its_picture_and_keeps_the_object_inside(kind: str) -> None:
    for seed in range(50):
        edit = scenes.edit(seed, (kind,))
        assert edit.kind == kind
        assert scenes.draw(edit.reference).tobytes() != scenes.draw(edit.target).tobytes()
        for scene in (edit.reference, edit.target):
            reach = scene.radius + scenes.MARGIN - 1e-9
            assert reach <= min(scene.x, scene.y) and max(scene.x, scene.y) <= scenes.SIZE - reach


def test_recoloured_object_has_the_colour_named() -> None:
    edit = next(
        e for e in map(lambda s: scenes.edit(s, ("recolor",)), range(100)) if e.reference.shape == "circle"
    )
    centre = (round(edit.target.x), round(edit.target.y))
    named = edit.instruction.split()[-1]
    assert scenes.draw(edit.target).getpixel(centre) == scenes.COLORS[named]
    assert scenes.draw(edit.reference).getpixel(centre) == scenes.COLORS[edit.reference.color]


def test_circle_has_the_area_of_a_circle() -> None:
    scene = scenes.Scene("circle", "black", "white", 24.0, 24.0, 12.0)
    pixels = to_bytes(scenes.draw(scene)).float().mean(0)
    white, black = (sum(scenes.COLORS[name]) / 3 for name in ("white", "black"))
    covered = float(((white - pixels) / (white - black)).sum())
    assert covered == pytest.approx(math.pi * 12**2, rel=0.02)


def test_pictures_survive_the_way_to_tensors_and_back() -> None:
    image = scenes.clutter(3)
    assert to_image(to_bytes(image)).tobytes() == image.tobytes()
    assert to_bytes(Image.new("RGB", (2, 1), (1, 2, 3)))[:, 0, 1].tolist() == [1, 2, 3]


def test_edit_error_counts_the_changed_pixels_only() -> None:
    reference = torch.zeros(3, 2, 2, dtype=torch.uint8)
    target, result = reference.clone(), reference.clone()
    target[:, 0, 0] = 90
    result[:, 0, 0], result[:, 1, 1] = 60, 255
    assert edit_error(reference, target, result) == 30


def test_learning_rate_rises_and_falls() -> None:
    steps = 1000
    assert rate_at(0, steps) == 1 / WARMUP
    assert rate_at(WARMUP, steps) == 1
    assert rate_at(steps - int(DECAY * steps / 2), steps) == pytest.approx(0.5)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[T5TokenizerFast, CLIPTokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    write_t5_tokenizer(folder / "t5")
    write_clip_tokenizer(folder / "clip")
    return T5TokenizerFast.from_pretrained(folder / "t5"), CLIPTokenizer.from_pretrained(folder / "clip")


def test_every_word_is_one_token(tokenizers: tuple[T5TokenizerFast, CLIPTokenizer]) -> None:
    t5, clip = tokenizers
    text = GRAMMAR.split()
    assert len(t5(" ".join(text)).input_ids) == len(text) + 1
    assert all(len(clip(word).input_ids) == 3 for word in WORDS)


def test_instructions_fit_and_unknown_words_come_through(
    tokenizers: tuple[T5TokenizerFast, CLIPTokenizer],
) -> None:
    t5, clip = tokenizers
    longest = max(len(t5(scenes.edit(seed).instruction).input_ids) for seed in range(500))
    assert longest <= 8
    assert t5.decode(t5("zebra").input_ids, skip_special_tokens=True).replace(" ", "") == "zebra"
    assert clip.decode(clip("zebra né").input_ids, skip_special_tokens=True).strip() == "zebra né"


@pytest.mark.parametrize("name", ["dit", "ae", "t5", "clip"])
def test_shipped_weights_are_small_and_finite(name: str) -> None:
    path = MODELS / f"{name}.safetensors"
    assert path.stat().st_size < 12_000_000
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        assert all(torch.isfinite(file.get_tensor(key)).all() for key in names)
