"""References: from pictures of any size to what the autoencoder reads. Whatever is done to them is said."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from kontext.console import notice
from kontext.data.images import Size, as_rgb, cover, crop_to_multiple, preferred_size, read_picture, stretch
from kontext.errors import UserError
from kontext.generation.request import Reference, Request
from kontext.model.latents import PIXELS_PER_TOKEN


@dataclass(frozen=True)
class Opened:
    """A reference at its own size, its name in messages, and what its file's form made necessary."""

    name: str
    image: Image.Image
    notes: tuple[str, ...] = ()


def open_references(request: Request) -> list[Opened]:
    """The request's references, upright and RGB; a single wide one where they are to be stitched.

    Raises UserError for one that cannot be read or has a side under 16 pixels.
    """
    opened = [_open(reference) for reference in request.references]
    return [stitch(opened)] if request.stitch and len(opened) > 1 else opened


def _open(reference: Reference) -> Opened:
    by_path = isinstance(reference, Path)
    name = str(reference) if by_path else "The reference"
    picture = read_picture(reference) if by_path else as_rgb(reference)
    width, height = picture.image.size
    if min(width, height) < PIXELS_PER_TOKEN:
        raise UserError(f"{name}: {width}x{height} pixels are too few; a reference needs 16 on each side.")
    return Opened(name, picture.image, picture.notes)


def stitch(opened: list[Opened]) -> Opened:
    """All pictures side by side, left to right, each scaled to the first one's height."""
    height = opened[0].image.height
    images = [at_height(each.image, height) for each in opened]
    wide = side_by_side(images)
    notes = [f"{each.name}: {note}" for each in opened for note in each.notes]
    notes.append(f"{len(images)} references stitched to {wide.width}x{wide.height}")
    return Opened("The references", wide, tuple(notes))


def at_height(image: Image.Image, height: int) -> Image.Image:
    """Scaled to `height` pixels, aspect ratio kept."""
    return stretch(image, (max(1, round(image.width * height / image.height)), height))


def side_by_side(images: list[Image.Image]) -> Image.Image:
    """Pictures of one height in a row."""
    row = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width
    return row


def encoded_size(size: Size, request: Request) -> Size | None:
    """The size at which a reference of `size` is encoded; None where it is only cropped to multiples of 16."""
    return preferred_size(size) if request.resize_references else None


def fit(image: Image.Image, size: Size | None, request: Request) -> Image.Image:
    """Stretched or cropped to `size`, as the request says; None: edges cut to multiples of 16 pixels."""
    if size is None:
        return crop_to_multiple(image)
    return cover(image, size) if request.crop_references else stretch(image, size)


def at_size(image: Image.Image, size: Size, request: Request) -> Image.Image:
    """A reference, or its mask, as it is encoded where that gives `size`; else brought to `size`."""
    prepared = fit(image, encoded_size(image.size, request), request)
    return prepared if prepared.size == size else fit(image, size, request)


def prepare(opened: Opened, request: Request) -> Image.Image:
    """The reference as it is encoded; says in one line what that took."""
    before = opened.image.size
    prepared = fit(opened.image, encoded_size(before, request), request)
    done = list(opened.notes)
    if prepared.size != before:
        done.append(f"{before[0]}x{before[1]} {_verb(request)}, {prepared.width}x{prepared.height}")
    if done:
        notice(f"{opened.name}: {'; '.join(done)}.")
    return prepared


def _verb(request: Request) -> str:
    if not request.resize_references:
        return "cropped"
    if request.crop_references:
        return "scaled and cropped to Kontext's nearest size"
    return "resized to Kontext's nearest size"


def restore(picture: Image.Image, opened: Opened) -> Image.Image:
    """The result at the reference's own size; says so."""
    size = opened.image.size
    if picture.size != size:
        notice(
            f"The picture is resized from {picture.width}x{picture.height} to {size[0]}x{size[1]}, "
            "the reference's own size."
        )
    return stretch(picture, size)
