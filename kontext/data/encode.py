"""Fill the cache: pictures are read and resized in worker processes while the encoder works."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
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
from kontext.data.plan import Entry
from kontext.errors import UserError

T = TypeVar("T")

REMEMBERED = 256
"""Latents kept for pictures that come again: about a MB each at a megapixel."""


@dataclass(frozen=True)
class Loaded:
    """A picture at its size: pixels (3, H, W) uint8; `notes` as in `Picture`."""

    pixels: Tensor
    stamp: Stamp
    notes: tuple[str, ...]

    @property
    def identity(self) -> tuple[str, torch.Size]:
        """Equal for pictures that have equal latents."""
        return self.stamp.content, self.pixels.shape


class Pictures(Dataset[Loaded | str]):
    """What the workers do: the picture `index` of the list brought to its size, or why it cannot be read."""

    def __init__(self, jobs: Sequence[tuple[Path, Size]]) -> None:
        self.jobs = jobs

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> Loaded | str:
        path, size = self.jobs[index]
        try:
            state = path.stat() if path.exists() else None
            data = read_bytes(path)
            picture = read_picture(path, data)
        except UserError as error:
            return str(error)
        assert state is not None, "read_bytes refuses what does not exist"
        return Loaded(to_pixels(cover(picture.image, size)), make_stamp(state, data), picture.notes)


class RememberingEncoder:
    """Encodes pictures of one size in batches, and each distinct one once.

    encode: pictures (B, 3, H, W) in -1..1 to latents (B, C, h, w).
    """

    def __init__(self, encode: Callable[[Tensor], Tensor], batch_size: int) -> None:
        self.encode, self.batch_size = encode, batch_size
        self.known: dict[tuple[str, torch.Size], Tensor] = {}

    def __call__(self, pictures: Sequence[Loaded]) -> list[Tensor]:
        """Latents (C, h, w) on the CPU, float32, one per picture."""
        new = {each.identity: each.pixels for each in pictures if each.identity not in self.known}
        by_size = sorted(new, key=lambda identity: identity[1])
        for _, same in groupby(by_size, key=lambda identity: identity[1]):
            for identities in chunks(same, self.batch_size):
                images = scale_pixels(torch.stack([new[identity] for identity in identities]))
                self.known.update(zip(identities, self.encode(images).float().cpu(), strict=True))
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
    with_pictures = _load(ordered, workers)
    for _, group in groupby(with_pictures, key=lambda pair: pair[0].sizes):
        for chunk in chunks(group, batch_size):
            yield from _encode_chunk(chunk, remembering, encoder=encoder, skips=skips)


def _load(entries: Sequence[Entry], workers: int) -> Iterator[tuple[Entry, list[Loaded | str]]]:
    jobs = [pair for entry in entries for pair in zip(entry.sources, entry.sizes, strict=True)]
    loader = DataLoader(
        Pictures(jobs),
        batch_size=None,
        num_workers=min(workers, len(jobs)),
        prefetch_factor=4 if workers and jobs else None,
    )
    pictures = iter(loader)
    for entry in entries:
        yield entry, [next(pictures) for _ in entry.sources]


def _encode_chunk(
    chunk: Iterable[tuple[Entry, list[Loaded | str]]],
    remembering: RememberingEncoder,
    *,
    encoder: str,
    skips: Skips,
) -> Iterator[Written]:
    ready: list[tuple[Entry, list[Loaded]]] = []
    for entry, pictures in chunk:
        failed = [each for each in pictures if isinstance(each, str)]
        if failed:
            skips.add(entry.item.image, failed[0])
        else:
            ready.append((entry, [each for each in pictures if isinstance(each, Loaded)]))
    latents = iter(remembering([each for _, pictures in ready for each in pictures]))
    for entry, pictures in ready:
        target, *references = (next(latents) for _ in pictures)
        record = Record(entry.dataset, encoder, tuple(each.stamp for each in pictures))
        both = Latents(target, tuple(references))
        write_latents(entry.latents, both, size=entry.size, record=record, source=str(entry.item.image))
        named = zip(entry.sources, pictures, strict=True)
        yield Written(entry, tuple((path, note) for path, each in named for note in each.notes))


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
    known: dict[str, Text] = {}
    wanted = {caption: len(by) for caption, by in owners.items()}  # by entries that are not written yet
    missing = {entry: len(entry.item.captions) for entry in entries}
    for captions in chunks(owners, batch_size):
        txt, vector = (each.cpu() for each in encode(list(captions)))
        known.update(zip(captions, map(Text, txt, vector), strict=True))
        for entry in (entry for caption in captions for entry in owners[caption]):
            missing[entry] -= 1
            if missing[entry]:
                continue
            texts = {caption: known[caption] for caption in entry.item.captions}
            write_text(entry.text, texts, record=Record(entry.dataset, encoder), source=str(entry.item.image))
            yield entry
            for caption in texts:
                wanted[caption] -= 1
                if not wanted[caption]:
                    del known[caption]


def chunks(values: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """Tuples of `size` values in turn; the last one may be shorter."""
    values = iter(values)
    while chunk := tuple(islice(values, size)):
        yield chunk
