"""`kontext generate --mask --strength`."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    mask = Image.new("L", (64, 48))
    mask.paste(255, (0, 0, 32, 48))
    mask.save(tmp_path / "mask.png")
    return ("--control-image", tmp_path / "photo.png", "--no-resize-control", "--prompt", "x", "--seed", 1)


def test_half_a_picture_is_edited(generate, tmp_path, photo):
    options = (
        *photo,
        "--mask",
        tmp_path / "mask.png",
        "--strength",
        0.5,
        "--mask-blur",
        2,
        "--output-name",
        "x",
    )
    code, said = generate(*options, size=None)
    assert code == 0, said
    with Image.open(tmp_path / "out" / "x.png") as result, Image.open(tmp_path / "photo.png") as before:
        assert result.text["strength"] == "0.5" and result.text["mask"] == str(tmp_path / "mask.png")
        after, original = np.array(result), np.array(before)
    assert (
        np.array_equal(after[:, 48:], original[:, 48:]) and (after[:, :24] != original[:, :24]).mean() > 0.9
    )


@pytest.mark.parametrize(
    "more, message",
    [
        (["--mask", "no.png"], "no.png: no such file"),
        (["--mask-blur", "2"], "--mask-blur needs --mask"),
        (["--strength", "0"], "--strength"),
    ],
)
def test_bad_input(generate, photo, more, message):
    code, said = generate(*photo, *more)
    assert code == 2 and message in said
