from pathlib import Path

import numpy as np
from PIL import Image

from kontext.data.items import Skips
from kontext.data.plan import plan_blocks
from kontext.data.sheet import CELL, GAP, contact_sheet
from tests.data.folders import dataset_file, pairs


def test_pictures_stand_side_by_side(tmp_path: Path) -> None:
    path = pairs(tmp_path, "ab", size=(64, 64))
    for folder, colour in (("img", (255, 0, 0)), ("ctl", (0, 0, 255))):
        Image.new("RGB", (64, 64), colour).save(tmp_path / folder / "b.png")
    entries = plan_blocks(path, Skips())[0].entries
    sheet = contact_sheet(entries[1:])
    assert sheet.getpixel((GAP + CELL // 2, GAP + CELL // 2)) == (255, 0, 0)
    assert sheet.getpixel((GAP + CELL + GAP + CELL // 2, GAP + CELL // 2)) == (0, 0, 255)
    caption = np.asarray(sheet)[:CELL, 2 * (CELL + GAP) + GAP :]
    assert (caption < 100).any(), "there is text"
    assert contact_sheet(entries).width > sheet.width


def test_damaged_picture_and_long_caption_leave_a_sheet(tmp_path: Path) -> None:
    pairs(tmp_path, "a")
    (tmp_path / "img" / "a.txt").write_text("word " * 500 + "x" * 500)
    path = dataset_file(tmp_path)
    entries = plan_blocks(path, Skips())[0].entries
    damaged = tmp_path / "img" / "a.png"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    sheet = np.asarray(contact_sheet(entries))
    assert (sheet[:, -GAP:] == 255).all(), "the caption stays within its card"
