"""Pictures from files and back: open anything as RGB, bring it to size, tensors in -1..1.

Sizes are (width, height) in pixels; tensors are (C, H, W).

Every resize is PIL's Lanczos, in both directions. BFL's and diffusers' reference preparation use exactly that
(`Image.resize`, anti-aliased when shrinking), so a picture looks the same to the model in training and in
generation. musubi-tuner shrinks by OpenCV's area average, which is slightly softer; the geometry is the same.
"""

import importlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms
from torch import Tensor

from kontext.errors import UserError
from kontext.model.latents import PIXELS_PER_TOKEN

Size = tuple[int, int]

PREFERRED_RESOLUTIONS: tuple[Size, ...] = (
    (672, 1568),
    (688, 1504),
    (720, 1456),
    (752, 1392),
    (800, 1328),
    (832, 1248),
    (880, 1184),
    (944, 1104),
    (1024, 1024),
    (1104, 944),
    (1184, 880),
    (1248, 832),
    (1328, 800),
    (1392, 752),
    (1456, 720),
    (1504, 688),
    (1568, 672),
)
"""The sizes that FLUX.1 Kontext was trained at."""


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture of an EXIF orientation upright; from 5 on, width and height change places."""


@dataclass(frozen=True)
class Picture:
    """An opened picture: upright, RGB, 8 bits; `notes` say what had to be done to the file's own form."""

    image: Image.Image
    notes: tuple[str, ...]


def open_image(path: Path) -> Image.Image:
    """The picture in `path`, upright and as 8-bit RGB; see `read_picture`."""
    return read_picture(path).image


def read_picture(path: Path, data: bytes | None = None) -> Picture:
    """Decode a picture file; `data` are the file's bytes when the caller has read them already.

    EXIF orientation is applied, transparency laid on white, 16-bit values scaled to 8, palettes and CMYK turned
    into RGB (CMYK through its embedded profile). RGB profiles are ignored, as in every program that runs the
    model. Raises UserError, naming the file, for whatever cannot be read whole.
    """
    with explained(path):
        return as_rgb(read_upright(path, data))


def read_upright(path: Path, data: bytes | None = None) -> Image.Image:
    """The decoded picture, upright, in its file's own mode. Raises UserError as `read_picture`."""
    with explained(path), _open(path, read_bytes(path) if data is None else data) as image:
        orientation = _orientation(image)
        image.load()
        turn = TURNS.get(orientation)
        return image if turn is None else image.transpose(turn)


def image_size(path: Path) -> Size:
    """Width and height of the upright picture, from the file's header alone."""
    with explained(path), _open(path, path) as image:
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn whatever a decoder raises into a UserError that names the file."""
    try:
        yield
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(str(path)) else f"{path}: {text}") from error
    except Exception as error:  # decoders raise whatever they trip over
        raise UserError(f"{path}: damaged or cut short ({error}).") from error


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 when there is none; the pixels are not decoded.

    Pillow's own method for PNG decodes the whole picture to find EXIF data behind the pixels, where no camera and
    no program is known to put it.
    """
    return Image.Image.getexif(image).get(0x0112, 1)


def read_bytes(path: Path) -> bytes:
    """The file's content. Raises UserError for what is missing, a folder, empty or not readable."""
    _check_file(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error


def _check_file(path: Path) -> None:
    if not path.exists():
        raise UserError(f"{path}: no such file.")
    if path.is_dir():
        raise UserError(f"{path}: is a folder, a picture file was expected.")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: is empty (0 bytes).")


def _open(path: Path, source: bytes | Path) -> Image.Image:
    """PIL's lazy image, its size checked before anything is decoded."""
    if path.suffix.lower() == ".jxl":
        _register_jxl(path)
    if isinstance(source, Path):
        _check_file(source)
    try:
        with warnings.catch_warnings():
            # Pillow warns from 89 megapixels on, which cameras reach, and refuses twice that
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
        raise UserError(f"{path}: has more than {limit} megapixels; scale it down first.") from error
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{path}: is not a picture that can be read (unknown or damaged format).") from error


def _register_jxl(path: Path) -> None:
    try:
        importlib.import_module("pillow_jxl")  # registers itself with Pillow
    except ImportError as error:
        raise UserError(f"{path}: JPEG XL needs the package pillow-jxl-plugin.") from error


def as_rgb(image: Image.Image) -> Picture:
    """A loaded picture of any mode as 8-bit RGB. Raises UserError for floating point pixels."""
    notes = []
    if image.mode.startswith("I"):
        image = _eight_bits(image)
        notes.append("16 bits scaled to 8")
    if image.mode == "F":
        raise UserError(
            "Its pixels are floating point numbers without a defined range; save it with 8 or 16 bits."
        )
    if image.has_transparency_data:
        image = _on_white(image)
        notes.append("transparency laid on white")
    if image.mode == "CMYK":
        image = _from_cmyk(image)
        notes.append("CMYK converted to RGB")
    return Picture(image.convert("RGB"), tuple(notes))


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey (Pillow's modes I and I;16*) to 8: 65535 -> 255, rounded, where `convert` would clip."""
    values = np.asarray(image).astype(np.float64)
    return Image.fromarray(np.clip(np.rint(values / 257), 0, 255).astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image)


def _from_cmyk(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if not profile:
        return image.convert("RGB")
    try:
        embedded = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, embedded, target, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):  # a broken profile is no reason to lose the picture
        return image.convert("RGB")
    return converted if converted is not None else image.convert("RGB")


def floor_multiple(length: int) -> int:
    """The largest multiple of 16 (one token's pixels) that is not greater."""
    return length - length % PIXELS_PER_TOKEN


def preferred_size(size: Size) -> Size:
    """The preferred resolution whose aspect ratio is nearest to that of `size`; ties go to the narrower one."""
    ratio = size[0] / size[1]
    return min(PREFERRED_RESOLUTIONS, key=lambda each: (abs(ratio - each[0] / each[1]), each))


def stretch(
    image: Image.Image, size: Size, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """Resize straight to `size`, whatever the aspect ratio."""
    return image if image.size == size else image.resize(size, resample)


def cover(
    image: Image.Image, size: Size, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """Scale until `size` is covered, then cut out its centre: aspect ratio kept, edges lost on one axis."""
    scale = max(size[0] / image.width, size[1] / image.height)
    scaled = (int(image.width * scale + 0.5), int(image.height * scale + 0.5))
    left, top = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    return stretch(image, scaled, resample).crop((left, top, left + size[0], top + size[1]))


def crop_to_multiple(image: Image.Image) -> Image.Image:
    """Cut right and bottom edges off until both sides are multiples of 16; no pixel is changed."""
    size = (floor_multiple(image.width), floor_multiple(image.height))
    if 0 in size:
        raise UserError(f"The picture has {image.width}x{image.height} pixels; 16x16 is the least.")
    return image if size == image.size else image.crop((0, 0, *size))


def prepare_reference(image: Image.Image, *, resize: bool = True) -> Image.Image:
    """A reference as generation and previews give it to the autoencoder.

    resize: stretch to the nearest preferred resolution, as BFL and diffusers do; otherwise crop to a multiple of 16.
    """
    return stretch(image, preferred_size(image.size)) if resize else crop_to_multiple(image)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W) float32 in -1..1."""
    return scale_pixels(to_pixels(image))


def to_pixels(image: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def scale_pixels(pixels: Tensor) -> Tensor:
    """uint8 0..255 -> float32 -1..1."""
    return pixels.float() / 127.5 - 1


def to_image(tensor: Tensor) -> Image.Image:
    """(3, H, W) in -1..1 -> RGB picture; values are clamped and rounded to the nearest of 256 steps."""
    pixels = ((tensor.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
