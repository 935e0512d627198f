"""Sizes by hand, pixels against PIL, and what is said about them."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from kontext.errors import UserError
from kontext.generation.references import Opened, open_references, prepare, restore
from kontext.generation.request import Request


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def equal(image, other):
    return image.size == other.size and np.array_equal(np.asarray(image), np.asarray(other))


def test_stretch_is_the_default_and_says_so(capsys):
    photo = picture(200, 100)
    found = prepare(Opened("a.png", photo), Request("x"))
    assert equal(found, photo.resize((1456, 720), Image.Resampling.LANCZOS))
    assert "a.png: 200x100 resized to Kontext's nearest size, 1456x720." in " ".join(
        capsys.readouterr().err.split()
    )


def test_crop_scales_and_cuts_the_centre(capsys):
    """200x100 to 1456x720: scaled by 7.28 to 1456x728, of which 4 rows go above and 4 below."""
    photo = picture(200, 100)
    found = prepare(Opened("a.png", photo), Request("x", crop_references=True))
    assert equal(found, photo.resize((1456, 728), Image.Resampling.LANCZOS).crop((0, 4, 1456, 724)))
    assert "scaled and cropped to Kontext's nearest size" in " ".join(capsys.readouterr().err.split())


def test_restore_is_lanczos_and_said(capsys):
    result = picture(64, 32)
    assert equal(
        restore(result, Opened("a.png", picture(50, 30))), result.resize((50, 30), Image.Resampling.LANCZOS)
    )
    assert "64x32 to 50x30" in " ".join(capsys.readouterr().err.split())
    assert restore(result, Opened("a.png", picture(64, 32))) is result and not capsys.readouterr().err


def test_stitched_references_stand_side_by_side_at_the_first_ones_height(capsys):
    left, right = picture(40, 60), picture(48, 32, seed=1)
    (wide,) = open_references(Request("x", (left, right), stitch=True))
    assert equal(wide.image.crop((0, 0, 40, 60)), left)
    assert equal(wide.image.crop((40, 0, 130, 60)), right.resize((90, 60), Image.Resampling.LANCZOS))
    assert wide.image.size == (130, 60)
    prepare(wide, Request("x", resize_references=False))
    said = " ".join(capsys.readouterr().err.split())
    assert "2 references stitched to 130x60; 130x60 cropped, 128x48" in said


def test_one_reference_is_not_stitched():
    (one,) = open_references(Request("x", (picture(40, 60),), stitch=True))
    assert one.image.size == (40, 60) and not one.notes


def png_of_claimed_size(path, width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b""))
    parts = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.parametrize(
    "size, message", [((20_000, 20_000), "more than 178 megapixels"), ((1, 1), "1x1 pixels are too few")]
)
def test_extreme_sizes_are_one_sentence(tmp_path, size, message):
    path = tmp_path / "odd.png"
    if size == (1, 1):
        Image.new("RGB", size).save(path)
    else:
        png_of_claimed_size(path, *size)
    with pytest.raises(UserError, match=rf"odd\.png: .*{message}"):
        open_references(Request("x", (path,)))
