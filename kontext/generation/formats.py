"""Picture files with the settings that made them, and the settings read back.

PNG holds them as its own text, JPEG and WebP as JSON in the user comment of EXIF.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, PngImagePlugin

from kontext.data.images import read_bytes
from kontext.errors import UserError
from kontext.files import atomic_write

FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
"""Pillow's name of each format, by the ending of its files."""
QUALITY = 95  # of JPEG and WebP
EXIF, USER_COMMENT, CODE = 0x8769, 0x9286, b"ASCII\0\0\0"


def save_picture(path: Path, picture: Image.Image, settings: Mapping[str, str]) -> None:
    """Writes a picture atomically, in the format that the path's ending names, with `settings` in it.

    Raises UserError for settings of over 64 KB in a JPEG.
    """
    format = FORMATS[path.suffix[1:]]
    if format == "PNG":
        options = {"pnginfo": _png_text(settings)}
    else:
        options = {"quality": QUALITY, "exif": _exif(settings)} if settings else {"quality": QUALITY}
    with atomic_write(path) as temporary:
        try:
            picture.save(temporary, format=format, **options)
        except ValueError as error:
            raise UserError(f"{path}: {error}; use PNG, or --no-metadata.") from error


def _png_text(settings: Mapping[str, str]) -> PngImagePlugin.PngInfo:
    text = PngImagePlugin.PngInfo()
    for name, value in settings.items():
        text.add_itxt(name, value)
    return text


def _exif(settings: Mapping[str, str]) -> bytes:
    exif = Image.Exif()
    exif.get_ifd(EXIF)[USER_COMMENT] = CODE + json.dumps(dict(settings)).encode("ascii")
    return exif.tobytes()


def read_settings(path: Path) -> dict[str, str]:
    """The settings in a picture that was made here. Raises UserError for a picture that cannot be read or has none."""
    read_bytes(path)
    try:
        with Image.open(path) as picture:
            settings = picture.text if picture.format == "PNG" else _comment(picture)
    except Exception as error:  # decoders raise whatever they trip over
        raise UserError(f"{path}: its settings cannot be read ({error}).") from error
    if not {"prompt", "seeds", "width", "height"} <= settings.keys():
        raise UserError(f"{path}: holds no settings of kontext; it was saved without, or by another program.")
    return {str(name): str(value) for name, value in settings.items()}


def _comment(picture: Image.Image) -> dict[str, str]:
    comment = picture.getexif().get_ifd(EXIF).get(USER_COMMENT, b"")
    if not isinstance(comment, bytes) or not comment.startswith(CODE):
        return {}
    settings = json.loads(comment.removeprefix(CODE))
    return settings if isinstance(settings, dict) else {}
