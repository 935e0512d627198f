import ast
import io
import struct
import warnings
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from kontext.data import images
from kontext.errors import UserError


def scene(width: int = 30, height: int = 20, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def saved(folder: Path, image: Image.Image, name: str = "a.png", **options: object) -> Path:
    image.save(folder / name, **options)
    return folder / name


def test_plain_picture_comes_back_unchanged(tmp_path: Path) -> None:
    picture = images.read_picture(saved(tmp_path, scene()))
    assert picture.notes == ()
    assert np.array_equal(picture.image, scene())


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int, name: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, scene(), name, exif=exif, lossless=True)
    expected = ImageOps.exif_transpose(Image.open(path))
    assert np.array_equal(images.open_image(path), expected)
    assert images.image_size(path) == expected.size == ((20, 30) if orientation >= 5 else (30, 20))


def test_size_needs_no_pixels(tmp_path: Path) -> None:
    path = saved(tmp_path, scene(300, 200))
    path.write_bytes(path.read_bytes()[:1000])
    assert images.image_size(path) == (300, 200)


def test_half_transparent_is_laid_on_white(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("RGBA", (2, 2), (100, 0, 200, 51)))
    picture = images.read_picture(path)
    assert picture.image.getpixel((0, 0)) == (224, 204, 244)  # 255 - (255 - v) * 51 / 255
    assert picture.notes == ("transparency laid on white",)


def test_transparent_colours_of_palettes_and_grey(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putdata([0, 1])
    path = saved(tmp_path, palette, transparency=0)
    assert np.asarray(images.open_image(path)).tolist() == [[[255, 255, 255], [200, 100, 50]]]
    path = saved(tmp_path, Image.new("LA", (1, 1), (7, 0)), "grey.png")
    assert images.open_image(path).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 257 * 100, 65535]], dtype=np.uint16)
    picture = images.read_picture(saved(tmp_path, Image.fromarray(values)))
    assert np.array_equal(np.asarray(picture.image)[0, :, 0], [0, 0, 1, 100, 255])
    assert picture.notes == ("16 bits scaled to 8",)


def test_sixteen_bit_colour(tmp_path: Path) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    row = b"\0" + struct.pack(">3H", 257 * 200, 257 * 100, 257 * 3)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b""))
    assert images.open_image(path).getpixel((0, 0)) == (200, 100, 3)


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_and_palette(tmp_path: Path, mode: str) -> None:
    path = saved(tmp_path, scene(mode=mode))
    assert np.array_equal(images.open_image(path), scene(mode=mode).convert("RGB"))


def test_cmyk_with_and_without_profile(tmp_path: Path) -> None:
    cmyk = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    picture = images.read_picture(saved(tmp_path, cmyk, "a.jpg", quality=100))
    assert np.abs(np.asarray(picture.image).astype(int) - [0, 255, 255]).max() <= 2
    assert picture.notes == ("CMYK converted to RGB",)
    path = saved(tmp_path, cmyk, "b.jpg", quality=100, icc_profile=b"no profile at all")
    assert np.array_equal(images.open_image(path), picture.image)


def test_embedded_rgb_profile_is_ignored(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = saved(tmp_path, scene(), icc_profile=profile)
    assert np.array_equal(images.open_image(path), scene())


def test_bytes_already_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    scene().save(buffer, format="PNG")
    assert np.array_equal(images.read_picture(Path("gone.png"), buffer.getvalue()).image, scene())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"just some text", "not a picture"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "damaged or cut short"),
    ],
)
def test_what_is_no_picture_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    for read in (images.open_image, images.image_size):
        with pytest.raises(UserError, match=reason) as error:
            read(path)
        assert str(error.value).count(str(path)) == 1


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp"])
def test_truncated_pictures_are_named(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, scene(200, 200), name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=f"{name}: "):
        images.open_image(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.png: no such file"):
        images.open_image(tmp_path / "gone.png")
    with pytest.raises(UserError, match="is a folder"):
        images.image_size(tmp_path)


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("F", (4, 4)), "a.tiff")
    with pytest.raises(UserError, match=r"a\.tiff: Its pixels are floating point"):
        images.open_image(path)


def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, scene(30, 20))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # 600 pixels of 400: where Pillow only warns, nothing is said
        images.open_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.raises(UserError, match=r"a\.png: has more than"):
        images.open_image(path)


def test_cover_keeps_the_ratio_and_the_centre() -> None:
    image = scene(300, 200)
    expected = image.resize((192, 128), Image.Resampling.LANCZOS).crop((32, 0, 160, 128))
    assert np.array_equal(images.cover(image, (128, 128)), expected)
    enlarged = image.resize((600, 400), Image.Resampling.LANCZOS).crop((140, 0, 460, 400))
    assert np.array_equal(images.cover(image, (320, 400)), enlarged)
    assert np.array_equal(images.cover(image, (300, 200)), image)


def test_cover_fills_every_size() -> None:
    for width, height in [(1, 1), (17, 300), (299, 31), (133, 133)]:
        for size in [(16, 16), (64, 48), (256, 16)]:
            assert images.cover(scene(width, height), size).size == size


def test_stretch_ignores_the_ratio() -> None:
    image = scene(300, 200)
    assert np.array_equal(images.stretch(image, (64, 64)), image.resize((64, 64), Image.Resampling.LANCZOS))


def test_crop_to_multiple_cuts_right_and_below() -> None:
    image = scene(50, 40)
    assert np.array_equal(images.crop_to_multiple(image), np.asarray(image)[:32, :48])
    with pytest.raises(UserError, match="50x15"):
        images.crop_to_multiple(scene(50, 15))


def test_preferred_sizes_are_those_of_diffusers() -> None:
    package = find_spec("diffusers")  # importing it takes seconds
    assert package is not None and package.origin is not None
    source = Path(package.origin).parent / "pipelines" / "flux" / "pipeline_flux_kontext.py"
    for statement in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and "PREFERRED" in ast.unparse(statement.targets[0]):
            assert sorted(ast.literal_eval(statement.value)) == sorted(images.PREFERRED_RESOLUTIONS)
            return
    pytest.fail("diffusers keeps the sizes elsewhere now")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((512, 512), (1024, 1024)),
        ((1920, 1080), (1392, 752)),  # 1.778: 1392/752 = 1.851, 1328/800 = 1.66
        ((100, 1000), (672, 1568)),
        ((3000, 1000), (1568, 672)),
        ((1104, 944), (1104, 944)),
    ],
)
def test_preferred_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert images.preferred_size(size) == expected


def test_references_are_stretched_or_cropped() -> None:
    image = scene(70, 60)
    resized = images.prepare_reference(image)
    assert np.array_equal(resized, image.resize((1104, 944), Image.Resampling.LANCZOS))
    assert images.prepare_reference(image, resize=False).size == (64, 48)


def test_tensor_and_back() -> None:
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    tensor = images.to_tensor(ramp)
    assert tensor.shape == (3, 16, 16) and tensor.dtype == torch.float32
    assert tensor.min() == -1 and tensor.max() == 1
    assert torch.isclose(tensor[1, 3, 3], torch.tensor(51 / 127.5 - 1))
    assert np.array_equal(images.to_image(tensor), ramp)


def test_pictures_are_rounded_and_clamped() -> None:
    values = torch.tensor([100.6 / 127.5 - 1, 100.4 / 127.5 - 1, 1.5, -7.0])
    image = images.to_image(values.repeat(3, 1, 1))
    assert [image.getpixel((x, 0))[0] for x in range(4)] == [101, 100, 255, 0]
