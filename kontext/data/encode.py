"""Fill the cache: pictures are read and resized in worker processes, and files written, while the encoder works."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kontext.data.cache import Latents, Record, Text, write_latents, write_text
from kontext.data.fingerprints import Stamp, make_stamp
from kontext.data.images import Size, cover, read_bytes, read_picture, scale_pixels, to_pixels
from kontext.data.items import Skips
from kontext.data.masks import latent_weights, read_layers, read_mask
from kontext.data.overlap import Result, behind, one_late
from kontext.data.plan import Entry
from kontext.errors import UserError

T = TypeVar("T")

ALPHA_NOTE = "alpha taken as loss mask"

REMEMBERED = 256
"""Latents kept for pictures that come again: about a MB each at a megapixel."""


@dataclass(frozen=True)
class Job:
    """A picture to read and the size that it is brought to; with its loss mask if it is a target that has one."""

    path: Path
    size: Size
    mask: Path | None = None


@dataclass(frozen=True)
class Mask:
    """A loss mask at latent size: weights (1, h, w), None where an alpha channel is wanted and there is none."""

    weights: Tensor | None
    stamp: Stamp


@dataclass(frozen=True)
class Loaded:
    """A picture at its size: pixels (3, H, W) uint8; `notes` as in `Picture`."""

    pixels: Tensor
    stamp: Stamp
    notes: tuple[str, ...]
    mask: Mask | None = None

    @property
    def identity(self) -> tuple[str, torch.Size, tuple[str, ...]]:
        """Equal for pictures that have equal latents: those of one file, size and treatment."""
        return self.stamp.content, self.pixels.shape, self.notes


def jobs_of(entry: Entry) -> list[Job]:
    """What an entry needs: its target, then its references."""
    target, *references = map(Job, entry.sources, entry.sizes)
    return [replace(target, mask=entry.item.mask), *references]


def load(job: Job) -> Loaded:
    """Read a picture, and its mask. Raises UserError when one of them cannot be used."""
    data, stamp = _read(job.path)
    if job.mask != job.path:
        picture = read_picture(job.path, data)
        mask = job.mask and _load_mask(job.mask, job.size)
    else:
        layers = read_layers(job.path, data)
        picture = layers.picture
        weights = None if layers.alpha is None else latent_weights(layers.alpha, job.size, job.path)
        mask = Mask(weights, stamp)
        picture = picture if weights is None else replace(picture, notes=(*picture.notes, ALPHA_NOTE))
    return Loaded(to_pixels(cover(picture.image, job.size)), stamp, picture.notes, mask)


def _load_mask(path: Path, size: Size) -> Mask:
    data, stamp = _read(path)
    return Mask(latent_weights(read_mask(path, data), size, path), stamp)


def _read(path: Path) -> tuple[bytes, Stamp]:
    """A file's content and its stamp, its times taken first: an edit in between is noticed next time."""
    state = path.stat() if path.exists() else None
    data = read_bytes(path)
    assert state is not None, "read_bytes refuses what does not exist"
    return data, make_stamp(state, data)


class Pictures(Dataset[Loaded | str]):
    """What the workers do: the picture `index` of the list brought to its size, or why it cannot be used."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> Loaded | str:
        try:
            return load(self.jobs[index])
        except UserError as error:
            return str(error)


@dataclass(frozen=True)
class Row:
    """One of the latents of a batch."""

    batch: Result
    number: int

    def fetched(self) -> Tensor:
        """Latents (C, h, w) on the CPU, float32."""
        return self.batch.fetched()[self.number].float()


class RememberingEncoder:
    """Encodes pictures of one size in batches, and each distinct one once.

    encode: pictures (B, 3, H, W) in -1..1 to latents (B, C, h, w).
    """

    def __init__(self, encode: Callable[[Tensor], Tensor], batch_size: int) -> None:
        self.encode, self.batch_size = encode, batch_size
        self.known: dict[tuple[str, torch.Size, tuple[str, ...]], Row] = {}

    def __call__(self, pictures: Sequence[Loaded]) -> list[Row]:
        """Latents, one per picture, perhaps still in the making."""
        new = {each.identity: each.pixels for each in pictures if each.identity not in self.known}
        by_size = sorted(new, key=lambda identity: identity[1])
        for _, same in groupby(by_size, key=lambda identity: identity[1]):
            for identities in chunks(same, self.batch_size):
                images = scale_pixels(torch.stack([new[identity] for identity in identities]))
                result = Result(self.encode(images))
                self.known.update({identity: Row(result, i) for i, identity in enumerate(identities)})
        latents = [self.known[each.identity] for each in pictures]
        while len(self.known) > REMEMBERED:
            del self.known[next(iter(self.known))]
        return latents


@dataclass(frozen=True)
class Written:
    """One entry that was encoded; `notes`: what was done to pictures, by path."""

    entry: Entry
    notes: tuple[tuple[Path, str], ...]


def encode_latents(
    entries: Sequence[Entry],
    encode: Callable[[Tensor], Tensor],
    *,
    encoder: str,
    batch_size: int,
    workers: int,
    skips: Skips,
) -> Iterator[Written]:
    """Encode and write the latents of each entry; those with an unreadable picture go to `skips`.

    Entries of equal sizes come together, and among them those that share references. encoder: the fingerprint for
    `Record`. Raises UserError, naming the target, when latents are not finite.
    """
    ordered = sorted(entries, key=lambda entry: (entry.sizes, entry.item.controls, entry.item.image))
    remembering = RememberingEncoder(encode, batch_size)
    by_size = groupby(_load(ordered, workers), key=lambda pair: pair[0].sizes)
    same_size = (chunk for _, group in by_size for chunk in chunks(group, batch_size))
    encoded = (_encode_chunk(chunk, remembering, skips) for chunk in same_size)
    return behind(each.written(encoder) for chunk in one_late(encoded) for each in chunk)


def _load(entries: Sequence[Entry], workers: int) -> Iterator[tuple[Entry, list[Loaded | str]]]:
    jobs = [job for entry in entries for job in jobs_of(entry)]
    loader = DataLoader(
        Pictures(jobs),
        batch_size=None,
        num_workers=min(workers, len(jobs)),
        prefetch_factor=4 if workers and jobs else None,
    )
    pictures = iter(loader)
    for entry in entries:
        yield entry, [next(pictures) for _ in entry.sources]


@dataclass(frozen=True)
class Encoded:
    """An entry with its pictures and their latents."""

    entry: Entry
    pictures: Sequence[Loaded]
    latents: Sequence[Row]

    def written(self, encoder: str) -> tuple[Callable[[], None], Written]:
        """What writes its file, and what is to be told then. Waits for the latents."""
        entry, mask = self.entry, self.pictures[0].mask
        target, *references = (row.fetched() for row in self.latents)
        result = Latents(target, tuple(references), mask and mask.weights)
        stamps = tuple(each.stamp for each in self.pictures)
        record = Record(entry.dataset, encoder, stamps, mask and mask.stamp)
        source = str(entry.item.image)
        write = partial(write_latents, entry.latents, result, size=entry.size, record=record, source=source)
        named = zip(entry.sources, self.pictures, strict=True)
        return write, Written(entry, tuple((path, note) for path, each in named for note in each.notes))


def _encode_chunk(
    chunk: Iterable[tuple[Entry, list[Loaded | str]]], remembering: RememberingEncoder, skips: Skips
) -> list[Encoded]:
    ready: list[tuple[Entry, list[Loaded]]] = []
    for entry, pictures in chunk:
        failed = [each for each in pictures if isinstance(each, str)]
        if failed:
            skips.add(entry.item.image, failed[0])
        else:
            ready.append((entry, [each for each in pictures if isinstance(each, Loaded)]))
    latents = iter(remembering([each for _, pictures in ready for each in pictures]))
    return [Encoded(entry, pictures, [next(latents) for _ in pictures]) for entry, pictures in ready]


def encode_texts(
    entries: Sequence[Entry],
    encode: Callable[[list[str]], tuple[Tensor, Tensor]],
    *,
    encoder: str,
    batch_size: int,
) -> Iterator[Entry]:
    """Encode each distinct caption once and write each entry when all of its captions are there.

    encode: B captions to (B, T, D) of T5 and (B, V) of CLIP. Raises UserError, naming the target, when an embedding
    is not finite.
    """
    owners: dict[str, list[Entry]] = {}
    for entry in entries:
        for caption in entry.item.captions:
            owners.setdefault(caption, []).append(entry)
    encoded = (
        (captions, list(map(Result, encode(list(captions))))) for captions in chunks(owners, batch_size)
    )
    return behind(_ready_texts(entries, owners, one_late(encoded), encoder))


def _ready_texts(
    entries: Sequence[Entry],
    owners: Mapping[str, Sequence[Entry]],
    encoded: Iterable[tuple[Sequence[str], Sequence[Result]]],
    encoder: str,
) -> Iterator[tuple[Callable[[], None], Entry]]:
    """What writes the file of each entry, as soon as all of its captions are encoded."""
    known: dict[str, Text] = {}
    wanted = {caption: len(by) for caption, by in owners.items()}  # by entries that are not written yet
    missing = {entry: len(entry.item.captions) for entry in entries}
    for captions, results in encoded:
        known.update(zip(captions, map(Text, *(result.fetched() for result in results)), strict=True))
        for entry in (entry for caption in captions for entry in owners[caption]):
            missing[entry] -= 1
            if missing[entry]:
                continue
            texts = {caption: known[caption] for caption in entry.item.captions}
            record, source = Record(entry.dataset, encoder), str(entry.item.image)
            yield partial(write_text, entry.text, texts, record=record, source=source), entry
            for caption in texts:
                wanted[caption] -= 1
                if not wanted[caption]:
                    del known[caption]


def chunks(values: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """Tuples of `size` values in turn; the last one may be shorter."""
    values = iter(values)
    while chunk := tuple(islice(values, size)):
        yield chunk
