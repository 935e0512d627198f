"""Settings in picture files, and back."""

import json

import numpy as np
import pytest
from PIL import Image

from kontext.errors import UserError
from kontext.generation.formats import FORMATS, read_settings, save_picture

SETTINGS = {"prompt": "a cät\nand more", "seeds": "7", "width": "64", "height": "48"}


@pytest.mark.parametrize("ending", FORMATS)
def test_settings_come_back(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    save_picture(path, Image.new("RGB", (64, 48), (200, 30, 90)), SETTINGS)
    assert read_settings(path) == SETTINGS
    with Image.open(path) as picture:
        assert picture.format == FORMATS[ending]
        assert np.abs(np.array(picture).astype(int) - (200, 30, 90)).max() <= 3


def test_a_comment_is_where_every_program_finds_it(tmp_path):
    save_picture(tmp_path / "a.jpg", Image.new("RGB", (8, 8)), SETTINGS)
    with Image.open(tmp_path / "a.jpg") as picture:
        assert json.loads(picture.getexif().get_ifd(0x8769)[0x9286][8:]) == SETTINGS


def test_settings_too_long_for_a_jpeg(tmp_path):
    with pytest.raises(UserError, match="use PNG, or --no-metadata"):
        save_picture(tmp_path / "a.jpg", Image.new("RGB", (8, 8)), SETTINGS | {"prompt": "x" * 70_000})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", FORMATS)
def test_pictures_without_settings(tmp_path, ending):
    save_picture(tmp_path / f"a.{ending}", Image.new("RGB", (8, 8)), {})
    with pytest.raises(UserError, match="holds no settings of kontext"):
        read_settings(tmp_path / f"a.{ending}")


def test_a_file_that_is_no_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"a\.png: its settings cannot be read"):
        read_settings(tmp_path / "a.png")
