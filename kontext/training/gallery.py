"""The sample pictures of a run as HTML: a row per prompt, references first, with the pictures in the page itself."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from kontext.data.images import open_image
from kontext.errors import UserError
from kontext.training.history import SampleSet

SIDE = 384  # pixels: the longer side of a picture in the page
QUALITY = 80
PICTURES = 96  # in a page, references aside: some 20 kB each


@dataclass(frozen=True)
class Thumbnail:
    """A picture small enough for a page: its data URI, its size in pixels, and the settings found in the file."""

    uri: str
    width: int
    height: int
    settings: Mapping[str, str]


@dataclass(frozen=True)
class Row:
    """One prompt with its pictures in the order of training, each under a caption."""

    prompt: str
    settings: Mapping[str, str]
    references: tuple[Thumbnail, ...]
    pictures: tuple[tuple[str, Thumbnail], ...]


@lru_cache(maxsize=2 * PICTURES)
def _thumbnail(path: Path, changed: int) -> Thumbnail:
    """changed: time of the last change, so that a file that was replaced is read again."""
    picture = open_image(path)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    with Image.open(path) as image:
        settings = {name: value for name, value in image.info.items() if isinstance(value, str)}
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=QUALITY)
    uri = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Thumbnail(uri, picture.width, picture.height, settings)


def thumbnail(path: Path) -> Thumbnail | None:
    """The picture in `path`, or None if it has gone or cannot be read: a report does without it."""
    try:
        return _thumbnail(path, path.stat().st_mtime_ns)
    except (UserError, OSError):
        return None


def spread(sets: Sequence[SampleSet], limit: int = PICTURES) -> list[SampleSet]:
    """Of many sets as many as make `limit` pictures, evenly chosen, the first and the last among them."""
    most = max(2, limit // max((len(one.pictures) for one in sets), default=1))
    if len(sets) <= most:
        return list(sets)
    return [sets[i] for i in np.linspace(0, len(sets) - 1, most).round().astype(int)]


def rows(sets: Sequence[SampleSet], folder: Path, caption: Callable[[int], str]) -> list[Row]:
    """The pictures by prompt. `caption` says when a picture was made, from the number of steps done."""
    found: dict[tuple[int, str], list[tuple[str, Thumbnail]]] = {}
    for one in sets:
        for place, name in enumerate(one.pictures):
            if (picture := thumbnail(folder / name)) is not None:
                key = (place, picture.settings.get("prompt", ""))
                found.setdefault(key, []).append((caption(one.step), picture))
    made = []
    for (_, prompt), pictures in sorted(found.items(), key=lambda entry: entry[0][0]):
        settings = pictures[-1][1].settings
        paths = settings.get("control_image", "").splitlines()
        references = tuple(one for path in paths if (one := thumbnail(Path(path))) is not None)
        made.append(Row(prompt, settings, references, tuple(pictures)))
    return made


def gallery(sets: Sequence[SampleSet], folder: Path, caption: Callable[[int], str]) -> str:
    """All rows as HTML; nothing if there are no pictures."""
    chosen = spread(sets)
    made = "".join(_row(row) for row in rows(chosen, folder, caption))
    if not made:
        return ""
    left_out = (
        f"<p>{len(chosen)} of {len(sets)} sets of samples are shown.</p>" if len(chosen) < len(sets) else ""
    )
    return f"<section><h2>Samples</h2>{left_out}{made}</section>\n"


def _row(row: Row) -> str:
    references = "".join(
        _figure(
            one, "Reference" if len(row.references) == 1 else f"Reference {number}", row.prompt, "reference"
        )
        for number, one in enumerate(row.references, 1)
    )
    pictures = "".join(_figure(one, caption, row.prompt, "sample") for caption, one in row.pictures)
    return (
        f'<article><h3 class="prompt">{escape(row.prompt) or "<i>no prompt</i>"}</h3>'
        f'<p class="small">{escape(_details(row.settings))}</p><div class="pictures">{references}{pictures}</div></article>\n'
    )


def _details(settings: Mapping[str, str]) -> str:
    """How all pictures of a row were made."""
    words = {
        "{width} × {height}": ("width", "height"),
        "{infer_steps} steps": ("infer_steps",),
        "guidance {embedded_cfg_scale}": ("embedded_cfg_scale",),
        "seed {seeds}": ("seeds",),
    }
    known = [
        text.format(**settings) for text, names in words.items() if all(name in settings for name in names)
    ]
    return " · ".join(known)


def _figure(picture: Thumbnail, caption: str, prompt: str, kind: str) -> str:
    words = escape(f"{caption}: {prompt}")
    return (
        f'<figure class="{kind}"><img src="{picture.uri}" width="{picture.width}" height="{picture.height}" alt="{words}" '
        f'loading="lazy"><figcaption>{escape(caption)}</figcaption></figure>'
    )
