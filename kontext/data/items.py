"""What a dataset block holds: target pictures with a caption and, for edits, their references."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kontext import console
from kontext.data.captions import captions_of
from kontext.data.config import Dataset
from kontext.data.masks import match_masks
from kontext.data.rows import read_rows
from kontext.errors import UserError

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl")
OTHER_PICTURES = (".heic", ".heif", ".tif", ".tiff", ".gif")


@dataclass(frozen=True)
class Item:
    """One thing to learn from. Without `controls` it is text-to-image.

    key: the name of its cache files, unique in its block; the target's name without extension wherever that is.
    others: captions that may be chosen in place of `caption`. dropout: how often the empty prompt is.
    control_dropout: how often a batch of such items goes without references. mask: the picture that says how much
    each part of the target counts; the target itself where its alpha does.
    """

    key: str
    image: Path
    caption: str
    controls: tuple[Path, ...]
    others: tuple[str, ...] = ()
    dropout: float = 0.0
    control_dropout: float = 0.0
    mask: Path | None = None

    @property
    def captions(self) -> tuple[str, ...]:
        """All that it may be shown with, different from one another: what the cache must hold."""
        return tuple(dict.fromkeys((self.caption, *self.others, *([""] if self.dropout else []))))


@dataclass(frozen=True)
class Skipped:
    """One thing that was left out."""

    name: str
    reason: str


@dataclass
class Skips:
    """Collects what is left out and why; with `strict` the first one ends the run."""

    strict: bool = False
    rows: list[Skipped] = field(default_factory=list)

    def add(self, name: Path | str, reason: str) -> None:
        """Leave `name` out. Raises UserError when strict."""
        reason = reason.removeprefix(f"{name}: ")
        if self.strict:
            raise UserError(f"{name}: {reason.rstrip('.')}. (Without --strict it would be skipped.)")
        self.rows.append(Skipped(str(name), reason))

    def show(self) -> None:
        """Print the table of all that was left out."""
        if self.rows:
            console.table("Skipped", ("file", "reason"), [(row.name, row.reason) for row in self.rows])


def list_items(dataset: Dataset, skips: Skips) -> tuple[Item, ...]:
    """The items of a block, in a fixed order. Repeats are left to the batches.

    What lacks a caption goes to `skips`. Raises UserError when references are missing or nothing is left.
    """
    before = len(skips.rows)
    items = _from_folder(dataset, skips) if dataset.image_directory else _from_jsonl(dataset, skips)
    left_out = skips.rows[before:]
    if not items and left_out:
        first = f"{left_out[0].name}: {left_out[0].reason}"
        raise UserError(f"{dataset.source}: all {len(left_out)} pictures were skipped, first {first}.")
    if not items:
        raise UserError(f"{dataset.source}: there are no pictures in it.")
    return items


def _item(
    key: str,
    image: Path,
    texts: Sequence[str],
    controls: tuple[Path, ...],
    mask: Path | None,
    dataset: Dataset,
) -> Item:
    caption, *others = captions_of(texts, dataset, image)
    rates = dataset.caption_dropout_rate, dataset.control_dropout_rate
    return Item(key, image, caption, controls, tuple(others), *rates, image if dataset.alpha_mask else mask)


def unique_keys(stems: Sequence[str]) -> list[str]:
    """Each stem, and where one comes again (in any case) a suffix that makes a name nobody else has: `a`, `a~2`."""
    taken: set[str] = set()
    given = {stem.casefold() for stem in stems}
    keys = []
    for stem in stems:
        key, number = stem, 1
        while key.casefold() in taken or (number > 1 and key.casefold() in given):
            number += 1
            key = f"{stem}~{number}"
        taken.add(key.casefold())
        keys.append(key)
    return keys


# ---- folders ----


def _from_folder(dataset: Dataset, skips: Skips) -> tuple[Item, ...]:
    assert dataset.image_directory is not None
    images = list_pictures(dataset.image_directory)
    controls: dict[Path, tuple[Path, ...]] = {}
    if dataset.control_directory:
        controls, lonely = match_controls(images, list_pictures(dataset.control_directory))
        if lonely:
            console.notice(f"{dataset.control_directory}: {_named(lonely)} not used: no target of that name.")
    masks = _masks(images, dataset.mask_directory) if dataset.mask_directory else {}
    items = []
    for key, image in zip(unique_keys([path.stem for path in images]), images, strict=True):
        texts = _texts_of(image, dataset.caption_extension, skips)
        if texts:
            items.append(_item(key, image, texts, controls.get(image, ()), masks.get(image), dataset))
    missing = [item.image for item in items if not item.controls]
    if dataset.control_directory and missing:
        raise UserError(
            f"{dataset.control_directory}: no reference for {_named(missing)}. A reference of cat.png is called "
            "cat.png, cat_0.png, cat_1.jpg ... Targets without one belong into a block without control_directory."
        )
    return tuple(items)


def _masks(images: Sequence[Path], folder: Path) -> dict[Path, Path]:
    files = list_pictures(folder)
    lonely = [path for path in files if path.stem not in {image.stem for image in images}]
    if lonely:
        console.notice(f"{folder}: {_named(lonely)} not used: no target of that name.")
    return match_masks(images, folder, files)


def list_pictures(folder: Path) -> list[Path]:
    """The picture files of a folder, not of its subfolders, sorted by name."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    other = [path for path in files if path.suffix.lower() in OTHER_PICTURES]
    if other:
        console.notice(f"{folder}: {_named(other)} not read. Kinds that are: {' '.join(IMAGE_EXTENSIONS)}")
    return [path for path in files if path.suffix.lower() in IMAGE_EXTENSIONS]


def match_controls(
    images: Iterable[Path], controls: Iterable[Path]
) -> tuple[dict[Path, tuple[Path, ...]], list[Path]]:
    """References by target, in order, and the references that are left over.

    A reference belongs to the target with the longest name T such that its own begins with `T.` or `T_`. `T.png`
    comes first, then `T_0.png`, `T_1.png` ... by number.
    """
    images = list(images)
    stems = {image.stem for image in images}
    found: dict[str, list[tuple[int, Path]]] = {stem: [] for stem in stems}
    lonely = []
    for control in controls:
        cuts = [match.start() for match in re.finditer(r"[._]", control.name)]
        owner = next((control.name[:cut] for cut in reversed(cuts) if control.name[:cut] in stems), None)
        if owner is None:
            lonely.append(control)
        else:
            found[owner].append((_rank(control, owner), control))
    ordered = {stem: tuple(path for _, path in sorted(pairs)) for stem, pairs in found.items()}
    return {image: ordered[image.stem] for image in images}, lonely


def _rank(control: Path, owner: str) -> int:
    if control.stem == owner:
        return 0
    number = control.stem.rpartition("_")[2]
    if not (number.isascii() and number.isdigit()):
        raise UserError(
            f"{control}: cannot tell which reference of {owner} this is. Name references {owner}.png, {owner}_0.png, "
            f"{owner}_1.png ..., or move this file elsewhere."
        )
    return int(number) + 1


def _texts_of(image: Path, endings: Sequence[str], skips: Skips) -> list[str]:
    """What is in the caption files beside a picture, of which there may be fewer than endings; empty if it is skipped."""
    paths = [image.with_name(image.stem + ending) for ending in endings]
    texts = []
    for path in paths:
        try:
            texts.append(path.read_text(encoding="utf-8-sig").strip())
        except FileNotFoundError:
            continue
        except UnicodeDecodeError:
            skips.add(image, f"the caption {path.name} is not UTF-8 text")
            return []
        except OSError as error:
            skips.add(image, f"the caption {path.name} cannot be read ({error.strerror})")
            return []
    if not texts:
        skips.add(image, f"no caption: there is no {' or '.join(path.name for path in paths)} beside it")
    return texts


def _named(paths: Sequence[Path], most: int = 5) -> str:
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(path.name for path in paths[:most]) + more


# ---- JSON lines ----


def _from_jsonl(dataset: Dataset, skips: Skips) -> tuple[Item, ...]:
    path = dataset.source
    rows = read_rows(path)
    if dataset.alpha_mask and any(row.mask for row in rows):
        raise UserError(f"{path}: alpha_mask and mask_path exclude each other; leave one out.")
    keys = unique_keys([row.image.stem for row in rows])
    items = []
    for key, row in zip(keys, rows, strict=True):
        if row.captions:
            texts = [text.strip() for text in row.captions]
            items.append(_item(key, row.image, texts, row.controls or (), row.mask, dataset))
        else:
            skips.add(f"{path}:{row.number}", f"no caption for {row.image}")
    return tuple(items)
