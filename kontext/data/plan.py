"""From a dataset file to the list of what must be in the cache, and what of it is there.

The list comes from the dataset file and the pictures alone, never from what lies in the cache folder.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kontext.data.buckets import control_size, target_size
from kontext.data.cache import Header, latents_path, read_header, text_path
from kontext.data.config import Dataset, load_datasets
from kontext.data.fingerprints import digest, is_unchanged
from kontext.data.images import Size, image_size
from kontext.data.items import Item, Skips, list_items
from kontext.errors import UserError
from kontext.model.latents import LATENT_FACTOR

READERS = 8


@dataclass(frozen=True)
class Entry:
    """An item with its sizes and its two cache files.

    dataset: the identity of its block. size: of the upright target picture; target, references: what the pictures are brought to.
    """

    item: Item
    dataset: str
    size: Size
    target: Size
    references: tuple[Size, ...]
    latents: Path
    text: Path

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Target first: entries that agree in them can share a batch."""
        return (self.target, *self.references)

    @property
    def sources(self) -> tuple[Path, ...]:
        """The picture files, target first."""
        return (self.item.image, *self.item.controls)


@dataclass(frozen=True)
class Block:
    """One block of the dataset file with its entries.

    unusable: keys of items that are listed but whose pictures cannot be opened; their cache files are kept.
    """

    dataset: Dataset
    entries: tuple[Entry, ...]
    unusable: frozenset[str]


def plan_blocks(path: Path, skips: Skips) -> tuple[Block, ...]:
    """All blocks of a dataset file, each item with its sizes. Items whose pictures cannot be opened go to `skips`.

    Only the headers of the pictures are read. Raises UserError when a block has nothing left.
    """
    return tuple(_plan_block(dataset, skips) for dataset in load_datasets(path))


def _plan_block(dataset: Dataset, skips: Skips) -> Block:
    items = list_items(dataset, skips)
    with ThreadPoolExecutor(READERS) as pool:
        planned = list(pool.map(lambda item: _plan_item(item, dataset), items))
    entries = []
    for item, entry in zip(items, planned, strict=True):
        if isinstance(entry, Entry):
            entries.append(entry)
        else:
            skips.add(item.image, entry)
    if not entries:
        raise UserError(
            f"{dataset.source}: no picture can be used, the last one because: {skips.rows[-1].reason}"
        )
    usable = {entry.item.key for entry in entries}
    return Block(dataset, tuple(entries), frozenset(item.key for item in items) - usable)


def identity(dataset: Dataset) -> str:
    """Hash of a block's source, for `Record.dataset`."""
    return digest(str(dataset.source.resolve()).encode())


def _plan_item(item: Item, dataset: Dataset) -> Entry | str:
    """The entry, or why there is none."""
    folder, rules = dataset.cache_folder, dataset.size_rules
    try:
        size = image_size(item.image)
        target = target_size(size, rules)
        references = tuple(control_size(image_size(path), target, rules) for path in item.controls)
    except UserError as error:
        return str(error)
    return Entry(
        item=item,
        dataset=identity(dataset),
        size=size,
        target=target,
        references=references,
        latents=latents_path(folder, item.key, size),
        text=text_path(folder, item.key),
    )


def latents_problem(entry: Entry, *, encoder: str | None = None) -> str | None:
    """Why the latents of an entry must be encoded, or None when they are up to date.

    encoder: the fingerprint that they should have; None when any will do. Files of other programs have none and no
    stamps: they are taken when their sizes are right and no picture is newer.
    """
    header = read_header(entry.latents) if entry.latents.exists() else None
    if header is None:
        return "damaged cache file" if entry.latents.exists() else "new"
    if _latent_sizes(header) != [
        (width // LATENT_FACTOR, height // LATENT_FACTOR) for width, height in entry.sizes
    ]:
        return "other sizes"
    if header.record is None:
        written = entry.latents.stat().st_mtime_ns
        newer = any(path.stat().st_mtime_ns > written for path in entry.sources)
        return "picture newer than its cache" if newer else None
    if encoder is not None and header.record.encoder != encoder:
        return "other weights or settings"
    stamps = header.record.sources
    same = len(stamps) == len(entry.sources) and all(map(is_unchanged, entry.sources, stamps))
    return None if same else "picture edited"


def text_problem(entry: Entry, *, encoder: str | None = None) -> str | None:
    """As `latents_problem`, for the text embeddings."""
    header = read_header(entry.text) if entry.text.exists() else None
    if header is None or not {"t5_vec", "clip_l_pooler"} <= header.shapes.keys():
        return "damaged cache file" if entry.text.exists() else "new"
    if header.caption != entry.item.caption:
        return "caption edited"
    if header.record and encoder is not None and header.record.encoder != encoder:
        return "other weights or settings"
    return None


def _latent_sizes(header: Header) -> list[Size]:
    """(width, height) of the cached latents, target first."""
    names = ("latents", *header.references)
    return [header.shapes[name][:-3:-1] for name in names if len(header.shapes.get(name, ())) == 3]


def problems(entries: Sequence[Entry], kind: str, *, encoder: str | None = None) -> list[str | None]:
    """`latents_problem` or `text_problem` of each entry."""
    check = latents_problem if kind == "latents" else text_problem
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda entry: check(entry, encoder=encoder), entries))
