"""From the caches to batches: which items come together in which order, and their tensors.

The order of an epoch is a function of (seed, epoch) alone, and any batch of it can be loaded without the ones
before: a resumed run continues where it was, and worker processes change nothing.
"""

import random
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kontext.data.cache import Kind, read_header, read_latents, read_text
from kontext.data.images import read_picture
from kontext.data.items import Skips
from kontext.data.plan import Block, Entry, plan_blocks, problems
from kontext.errors import UserError

COMMANDS: Mapping[Kind, str] = {"latents": "cache-latents", "text": "cache-text"}


@dataclass(frozen=True)
class Batch:
    """Items of equal sizes. B items, C latent channels, h and w an eighth of the pixels, T text tokens.

    latents (B, C, h, w); references (B, C, h', w') each, none for text-to-image; txt (B, T, D); vector (B, V);
    keys: the items' names.
    """

    latents: Tensor
    references: tuple[Tensor, ...]
    txt: Tensor
    vector: Tensor
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """Entries that can share a batch."""

    entries: tuple[Entry, ...]
    batch_size: int
    repeats: int


class Batches:
    """The batches of a dataset file, by epoch and index. Safe to copy into worker processes."""

    def __init__(self, groups: Sequence[Group], *, seed: int) -> None:
        self.groups = tuple(groups)
        self.seed = seed
        self._known: tuple[int, tuple[tuple[Entry, ...], ...]] = (-1, ())

    @property
    def items_per_epoch(self) -> int:
        """Items that one epoch shows, repeats counted."""
        return sum(len(group.entries) * group.repeats for group in self.groups)

    def sizes(self, epoch: int) -> list[int]:
        """Items in each batch of an epoch, in its order."""
        return [len(batch) for batch in self.order(epoch)]

    def order(self, epoch: int) -> tuple[tuple[Entry, ...], ...]:
        """The entries of each batch of an epoch; every item comes as often as its block repeats it."""
        if self._known[0] != epoch:
            self._known = epoch, shuffled(self.groups, f"{self.seed}/{epoch}")
        return self._known[1]

    def load(self, epoch: int, index: int) -> Batch:
        """A batch of an epoch, from the caches. Raises UserError when a cache file is gone."""
        return load_batch(self.order(epoch)[index])


def shuffled(groups: Sequence[Group], seed: str) -> tuple[tuple[Entry, ...], ...]:
    """Items shuffled within their group and cut into batches, then all batches shuffled."""
    source = random.Random(seed)
    batches = []
    for group in groups:
        entries = list(group.entries) * group.repeats
        source.shuffle(entries)
        size = group.batch_size
        batches += [tuple(entries[start : start + size]) for start in range(0, len(entries), size)]
    source.shuffle(batches)
    return tuple(batches)


def load_batch(entries: Sequence[Entry]) -> Batch:
    """The cached tensors of entries of equal sizes."""
    latents = [read_latents(entry.latents) for entry in entries]
    texts = [read_text(entry.text) for entry in entries]
    references = zip(*(each.references for each in latents), strict=True)
    return Batch(
        latents=torch.stack([each.target for each in latents]),
        references=tuple(torch.stack(same) for same in references),
        txt=torch.stack([each.txt for each in texts]),
        vector=torch.stack([each.vector for each in texts]),
        keys=tuple(entry.item.key for entry in entries),
    )


def open_batches(
    path: Path, *, seed: int, skips: Skips, encoders: Mapping[str, Path | None] | None = None
) -> Batches:
    """The batches of a dataset file whose caches are complete and up to date.

    Items whose pictures are unreadable go to `skips`, as when caching. encoders: option names and paths (`vae`,
    `text_encoder1` ...) for the command lines in the message.

    Raises UserError with the commands to run when something is missing from the caches or stale.
    """
    blocks = plan_blocks(path, skips)
    skipped: set[Entry] = set()
    lacking = []
    for kind in COMMANDS:
        entries = [entry for block in blocks for entry in block.entries if entry not in skipped]
        stale = {entry: why for entry, why in zip(entries, problems(entries, kind), strict=True) if why}
        if kind == "latents" and stale:
            skipped = set(_unreadable(list(stale), skips))
            stale = {entry: why for entry, why in stale.items() if entry not in skipped}
        if stale:
            lacking.append(_lack(kind, list(stale.values()), len(entries), path, encoders or {}))
    if lacking:
        raise UserError(f"{path}: the caches are not complete. " + " ".join(lacking))
    groups = [group for block in blocks for group in _group(block, skipped)]
    _check_one_encoder(path, groups, encoders or {})
    if not groups:
        raise UserError(
            f"{path}: no picture can be used; the first one is skipped because: {skips.rows[0].reason}"
        )
    return Batches(groups, seed=seed)


def _unreadable(entries: Sequence[Entry], skips: Skips) -> list[Entry]:
    """The entries without cache, when the reason is that none of them can be decoded: caching has skipped them.

    As soon as one can be decoded, caching has not been run, and the others need not be tried.
    """
    found = []
    for entry in entries:
        try:
            for source in entry.sources:
                read_picture(source)
        except UserError as error:
            found.append((entry, str(error)))
        else:
            break
    for entry, reason in found:
        skips.add(entry.item.image, reason)
    return [entry for entry, _ in found]


def _lack(
    kind: Kind, reasons: Sequence[str], total: int, path: Path, encoders: Mapping[str, Path | None]
) -> str:
    counts = ", ".join(f"{reasons.count(reason)} {reason}" for reason in sorted(set(reasons)))
    what = "latents" if kind == "latents" else "text embeddings"
    return (
        f"{len(reasons)} of {total} {what} must be encoded ({counts}): run `{command(kind, path, encoders)}`."
    )


def command(kind: Kind, path: Path, encoders: Mapping[str, Path | None]) -> str:
    """The command line that fills the cache; what is not known is left for the user to fill in."""
    wanted = ("vae",) if kind == "latents" else ("text_encoder1", "text_encoder2")
    words = ["kontext", COMMANDS[kind], "--dataset-config", str(path)]
    for name in wanted:
        words += [f"--{name.replace('_', '-')}", str(encoders.get(name) or name.upper())]
    return shlex.join(words)


def _group(block: Block, left_out: set[Entry]) -> list[Group]:
    """Entries by sizes of target and references, and by the shape of their text embeddings."""
    groups: dict[tuple[object, ...], list[Entry]] = {}
    for entry in block.entries:
        if entry not in left_out:
            header = read_header(entry.text)
            assert header is not None, "just checked"
            shapes = (header.shapes["t5_vec"], header.shapes["clip_l_pooler"])
            groups.setdefault((entry.sizes, shapes), []).append(entry)
    return [
        Group(tuple(entries), block.dataset.batch_size, block.dataset.num_repeats)
        for entries in groups.values()
    ]


def _check_one_encoder(path: Path, groups: Sequence[Group], encoders: Mapping[str, Path | None]) -> None:
    """Raise UserError when half of the cache was made with other weights: what an interrupted re-encoding leaves."""
    for kind in COMMANDS:
        used = set()
        for group in groups:
            for entry in group.entries:
                header = read_header(entry.latents if kind == "latents" else entry.text)
                if header and header.record:
                    used.add(header.record.encoder)
        if len(used) > 1:
            raise UserError(
                f"{path}: the cached {kind} were made with {len(used)} different encoders or settings: run "
                f"`{command(kind, path, encoders)}`."
            )
