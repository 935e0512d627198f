"""Loss masks from the picture files to the batches, against masks that NumPy averages."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kontext.data.batches import open_batches
from kontext.data.cache import read_latents
from kontext.data.encode import encode_latents, encode_texts
from kontext.data.items import Skips
from kontext.data.masks import latent_weights, match_masks, read_layers, read_mask
from kontext.data.plan import Entry, check_caches, plan_blocks
from kontext.data.sheet import CELL, GAP, contact_sheet
from kontext.errors import UserError
from tests.data.folders import dataset_file, pairs, picture, shrink
from tests.data.test_items import jsonl


def planned(path: Path) -> list[Entry]:
    return [entry for block in plan_blocks(path, Skips()) for entry in block.entries]


def fill(path: Path, skips: Skips | None = None) -> list[Entry]:
    entries = planned(path)
    written = encode_latents(
        entries, shrink, encoder="e", batch_size=2, workers=0, skips=skips or Skips(strict=True)
    )
    done = [each.entry for each in written]
    list(
        encode_texts(
            entries, lambda c: (torch.ones(len(c), 3, 2), torch.ones(len(c), 2)), encoder="e", batch_size=4
        )
    )
    return done


def halves(path: Path, size: tuple[int, int] = (64, 48), white: int = 24, mode: str = "L") -> Path:
    """A mask whose first `white` columns are white."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.new(mode, size)
    mask.paste(Image.new(mode, (white, size[1]), "white"))
    mask.save(path)
    return path


def masked(root: Path, names: str = "abc") -> Path:
    """Pairs of 64x48 pixels with masks; the targets keep their size."""
    pairs(root, names)
    for index, name in enumerate(names):
        halves(root / "mask" / f"{name}.png", white=12 + 8 * index)
    return dataset_file(
        root,
        "resolution = [64, 48]\nenable_bucket = true\nbucket_no_upscale = true",
        control_directory=root / "ctl",
        mask_directory=root / "mask",
    )


def problems(path: Path) -> dict[str, str | None]:
    entries = planned(path)
    statuses = check_caches(entries, "latents")
    return {e.item.key: s.problem for e, s in zip(entries, statuses, strict=True) if s.problem}


def test_masks_are_means_of_8x8_pixels_and_reach_the_batch(tmp_path: Path) -> None:
    path = masked(tmp_path)
    assert len(fill(path)) == 3
    batches = open_batches(path, seed=0, skips=Skips())
    for index in range(3):
        batch = batches.load(0, index)
        white = 12 + 8 * "abc".index(batch.keys[0])
        columns = np.clip((white - 8 * np.arange(8)) / 8, 0, 1)  # 12 pixels: 1, 0.5, 0 ...
        assert batch.masks is not None and batch.masks.shape == (1, 1, 6, 8)
        np.testing.assert_allclose(batch.masks[0, 0], np.tile(columns, (6, 1)), atol=1e-6)


def test_a_mask_is_cropped_as_its_target(tmp_path: Path) -> None:
    """Target and mask show the same picture, so the encoded target and the weights must agree."""
    mask = halves(tmp_path / "mask" / "a.png", (300, 200), white=130)
    (tmp_path / "img").mkdir()
    Image.open(mask).convert("RGB").save(tmp_path / "img" / "a.png")
    (tmp_path / "img" / "a.txt").write_text("x")
    path = dataset_file(tmp_path, "resolution = [64, 64]", mask_directory=tmp_path / "mask")
    fill(path)
    back = read_latents(planned(path)[0].latents)
    assert back.mask is not None and back.mask.shape == (1, 8, 8)
    assert (back.mask[0] - (back.target[0] + 1) / 2).abs().max() < 0.02
    assert 0 < back.mask.mean() < 1


def test_beside_an_edge_a_mask_is_exactly_black(tmp_path: Path) -> None:
    weights = latent_weights(Image.open(halves(tmp_path / "m.png", (512, 512), 256)), (96, 96), tmp_path)
    assert (weights[:, :, 7:] == 0).all() and (weights[:, :, :5] > 0.999).all()


def test_alpha_is_the_mask_and_colours_stay(tmp_path: Path) -> None:
    """Colours under transparency are kept; without alpha_mask they are laid on white."""
    (tmp_path / "img").mkdir()
    target = Image.new("RGBA", (64, 64), (10, 200, 30, 255))
    target.paste((10, 200, 30, 0), (32, 0, 64, 64))
    target.save(tmp_path / "img" / "a.png")
    picture(tmp_path / "img" / "b.png", (64, 64))
    for name in "ab":
        (tmp_path / "img" / f"{name}.txt").write_text("x")
    path = dataset_file(tmp_path, alpha_mask=True, batch_size=2)
    fill(path)
    assert problems(path) == {}
    batch = open_batches(path, seed=0, skips=Skips()).load(0, 0)
    a, b = batch.keys.index("a"), batch.keys.index("b")
    assert batch.masks is not None
    assert (batch.masks[a, 0, :, :4] == 1).all() and (batch.masks[a, 0, :, 4:] == 0).all()
    assert (batch.masks[b] == 1).all(), "no alpha: all of it counts"
    assert torch.allclose(batch.latents[a, 1], torch.tensor(200 / 127.5 - 1), atol=1e-3)

    plain = dataset_file(tmp_path)
    assert problems(plain) == {"a": "mask removed", "b": "mask removed"}
    fill(plain)
    back = read_latents(planned(plain)[0].latents)
    assert back.mask is None and (back.target[:, :, 5:] == 1).all()
    assert open_batches(plain, seed=0, skips=Skips()).load(0, 0).masks is None


def test_a_target_with_alpha_may_be_its_own_reference(tmp_path: Path) -> None:
    """The two have other pixels: as a reference it is laid on white."""
    for folder in ("img", "ctl"):
        (tmp_path / folder).mkdir()
        layer = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
        layer.paste((0, 0, 0, 0), (32, 0, 64, 64))
        layer.save(tmp_path / folder / "a.png")
    (tmp_path / "img" / "a.txt").write_text("x")
    path = dataset_file(tmp_path, control_directory=tmp_path / "ctl", alpha_mask=True)
    fill(path)
    back = read_latents(planned(path)[0].latents)
    assert (back.target == -1).all() and (back.references[0][:, :, 5:] == 1).all()


def test_edited_added_and_removed_masks_are_noticed(tmp_path: Path) -> None:
    path = masked(tmp_path)
    fill(path)
    assert problems(path) == {}
    data = (tmp_path / "mask" / "a.png").read_bytes()
    (tmp_path / "mask" / "a.png").write_bytes(data)
    assert problems(path) == {}, "only touched"
    halves(tmp_path / "mask" / "b.png", white=40)
    assert problems(path) == {"b": "mask edited"}
    text = path.read_text()
    path.write_text(text.replace("mask_directory", "#"))
    assert set(problems(path).values()) == {"mask removed"}
    fill(path)
    path.write_text(text)
    assert set(problems(path).values()) == {"mask added"}


def test_masks_of_json_lines(tmp_path: Path) -> None:
    image = str(picture(tmp_path / "img" / "a.png", (64, 64)))
    other = str(picture(tmp_path / "img" / "b.png", (64, 64), 1))
    mask = str(halves(tmp_path / "m.png", (64, 64), 32))
    first = {"image_path": image, "caption": "x", "mask_path": mask}
    second = {"image_path": other, "caption": "y"}
    with pytest.raises(UserError, match="no mask_path in line 2"):
        planned(jsonl(tmp_path, first, second))
    path = jsonl(tmp_path, first, {**second, "mask_path": None})
    path.write_text(path.read_text().replace("[[datasets]]", "batch_size = 2\n[[datasets]]"))
    fill(path)
    batch = open_batches(path, seed=0, skips=Skips()).load(0, 0)
    assert batch.masks is not None
    assert dict(zip(batch.keys, batch.masks.mean((1, 2, 3)).tolist(), strict=True)) == {"a": 0.5, "b": 1}
    with pytest.raises(UserError, match=r"items.jsonl:1: the loss mask gone.png does not exist"):
        planned(jsonl(tmp_path, {**first, "mask_path": "gone.png"}))
    with pytest.raises(UserError, match="Did you mean mask_path"):
        planned(jsonl(tmp_path, {**second, "mask_pth": mask}))
    with pytest.raises(UserError, match="one loss mask"):
        planned(jsonl(tmp_path, {**second, "mask_path_0": mask, "mask_path_1": mask}))


def test_missing_and_wrongly_sized_masks_name_the_file(tmp_path: Path) -> None:
    path = masked(tmp_path)
    halves(tmp_path / "mask" / "b.png", (48, 64))
    with pytest.raises(UserError, match=r"mask/b\.png: .* 48x64 pixels, but .*img/b\.png has 64x48"):
        planned(path)
    (tmp_path / "mask" / "b.png").unlink()
    with pytest.raises(UserError, match=r"no loss mask for b\.png. Add .*mask/b\.png"):
        planned(path)
    for ending in ("webp", "png"):
        halves(tmp_path / "mask" / f"b.{ending}")
    with pytest.raises(UserError, match=r"b\.png and b\.webp: keep one"):
        planned(path)


def test_a_black_mask_is_skipped_with_its_reason_when_caching_and_training(tmp_path: Path) -> None:
    path = masked(tmp_path)
    halves(tmp_path / "mask" / "b.png", white=0)
    skips = Skips()
    assert [entry.item.key for entry in fill(path, skips)] == ["a", "c"]
    assert "mask/b.png: this loss mask is black" in skips.rows[0].reason
    with pytest.raises(UserError, match="is black"):
        fill(path, Skips(strict=True))
    skips = Skips()
    assert open_batches(path, seed=0, skips=skips).items_per_epoch == 2
    assert "is black" in skips.rows[0].reason


def test_what_is_transparent_in_a_mask_does_not_count(tmp_path: Path) -> None:
    layer = Image.new("RGBA", (4, 1), (255, 255, 255, 0))
    layer.putpixel((1, 0), (255, 255, 255, 255))
    layer.putpixel((2, 0), (255, 255, 255, 51))
    layer.save(tmp_path / "m.png")
    assert list(read_mask(tmp_path / "m.png").tobytes()) == [0, 255, 51, 0]
    deep = Image.fromarray(np.array([[0, 32896, 65535]], dtype=np.uint16))
    deep.save(tmp_path / "deep.png")
    assert list(read_mask(tmp_path / "deep.png").tobytes()) == [0, 128, 255]
    assert read_layers(tmp_path / "deep.png").alpha is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mask_directory": "mask", "alpha_mask": True}, "exclude each other"),
        ({"mask_directory": "img"}, "mask_directory is the image_directory"),
        ({"mask_directory": "gone"}, "mask_directory .*gone does not exist"),
        ({"mask_dir": "mask"}, "Did you mean mask_directory"),
    ],
)
def test_keys_that_cannot_be(tmp_path: Path, keys: dict[str, object], message: str) -> None:
    masked(tmp_path)
    keys = {name: tmp_path / value if isinstance(value, str) else value for name, value in keys.items()}
    with pytest.raises(UserError, match=message):
        planned(dataset_file(tmp_path, **keys))


def test_match_is_by_the_whole_stem() -> None:
    found = match_masks([Path("i/a.png"), Path("i/a.jpg")], Path("m"), [Path("m/a.png"), Path("m/a_0.png")])
    assert found == {Path("i/a.png"): Path("m/a.png"), Path("i/a.jpg"): Path("m/a.png")}


def test_the_contact_sheet_shows_the_mask(tmp_path: Path) -> None:
    path = masked(tmp_path, "a")
    sheet = contact_sheet(planned(path))
    left = GAP + 2 * (CELL + GAP)
    assert sheet.getpixel((left + 10, GAP + 20)) == (255, 255, 255)
    assert sheet.getpixel((left + CELL - 10, GAP + 20)) == (0, 0, 0)
