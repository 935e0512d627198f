"""From a dataset file to the list of what must be in the cache, and what of it is there.

The list comes from the dataset file and the pictures alone, never from what lies in the cache folder.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kontext.data.buckets import control_size, target_size
from kontext.data.cache import Header, Kind, latents_path, read_header, text_path
from kontext.data.config import Dataset, read_dataset_file
from kontext.data.fingerprints import Stamp, digest, is_unchanged
from kontext.data.images import Size, image_size
from kontext.data.items import Item, Skips, list_items
from kontext.data.masks import check_size
from kontext.errors import UserError
from kontext.model.latents import LATENT_FACTOR

READERS = 8

Part = Literal["training", "validation"]


@dataclass(frozen=True)
class Entry:
    """An item with its sizes and its two cache files.

    dataset: the identity of its block. size: of the upright target picture; target, references: what the pictures are
    brought to.
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


def plan_blocks(path: Path, skips: Skips, part: Part | None = None) -> tuple[Block, ...]:
    """The blocks of a dataset file, or of one part of it, each item with its sizes.

    Only the headers of the pictures are read. Items whose pictures cannot be opened go to `skips`. Raises UserError
    when a block has nothing left.
    """
    file = read_dataset_file(
        path, tell=part != "validation"
    )  # who asks for it has asked for the training part
    parts = {"training": file.training, "validation": file.validation}
    datasets = parts[part] if part else file.training + file.validation
    return tuple(_plan_block(dataset, skips) for dataset in datasets)


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
    """The entry, or why there is none. Raises UserError for a loss mask of another size than its target."""
    folder, rules = dataset.cache_folder, dataset.size_rules
    try:
        size = image_size(item.image)
        target = target_size(size, rules)
        references = tuple(control_size(image_size(path), target, rules) for path in item.controls)
        mask_size = image_size(item.mask) if item.mask else size
    except UserError as error:
        return str(error)
    if item.mask:
        check_size(item.mask, mask_size, item.image, size)
    return Entry(
        item=item,
        dataset=identity(dataset),
        size=size,
        target=target,
        references=references,
        latents=latents_path(folder, item.key, size),
        text=text_path(folder, item.key),
    )


@dataclass(frozen=True)
class Status:
    """One cache file of an entry: why it must be made anew (None: it is up to date), and what it says."""

    problem: str | None
    header: Header | None


def check_caches(entries: Sequence[Entry], kind: Kind, *, encoder: str | None = None) -> list[Status]:
    """The state of the latents or text files of the entries, one by one.

    encoder: the fingerprint that they should have; None when any will do.
    """

    def check(entry: Entry) -> Status:
        path = entry.latents if kind == "latents" else entry.text
        if not path.exists():
            return Status("new", None)
        header = read_header(path)
        if header is None:
            return Status("damaged cache file", None)
        other = header.record and encoder is not None and header.record.encoder != encoder
        problem = _latents_problem(entry, header) if kind == "latents" else _text_problem(entry, header)
        return Status(problem or ("other weights or settings" if other else None), header)

    with ThreadPoolExecutor(READERS) as pool:  # for the sake of network drives
        return list(pool.map(check, entries))


def _latents_problem(entry: Entry, header: Header) -> str | None:
    """Files of other programs have no stamps: they are taken when their sizes are right and no picture is newer."""
    wanted = [(width // LATENT_FACTOR, height // LATENT_FACTOR) for width, height in entry.sizes]
    if _latent_sizes(header) != wanted:
        return "other sizes"
    if header.record is None:
        written = entry.latents.stat().st_mtime_ns
        newer = any(path.stat().st_mtime_ns > written for path in entry.sources)
        return "picture newer than its cache" if newer else _mask_problem(entry, None)
    stamps = header.record.sources
    same = len(stamps) == len(entry.sources) and all(map(is_unchanged, entry.sources, stamps))
    return _mask_problem(entry, header.record.mask) if same else "picture edited"


def _mask_problem(entry: Entry, stamp: Stamp | None) -> str | None:
    """stamp: of the loss mask that is in the cache file, if one is."""
    mask = entry.item.mask
    if mask is None or stamp is None:
        return None if mask is stamp is None else f"mask {'added' if mask else 'removed'}"
    return None if is_unchanged(mask, stamp) else "mask edited"


def _text_problem(entry: Entry, header: Header) -> str | None:
    if not {"t5_vec", "clip_l_pooler"} <= header.shapes.keys():
        return "damaged cache file"
    return None if set(entry.item.captions) <= set(header.captions) else "caption edited"


def _latent_sizes(header: Header) -> list[Size]:
    """(width, height) of the cached latents, target first."""
    names = ("latents", *header.references)
    return [header.shapes[name][:-3:-1] for name in names if len(header.shapes.get(name, ())) == 3]
