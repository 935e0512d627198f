"""From the caches to batches: which items come together in which order, and their tensors.

The order of an epoch is a function of (seed, epoch) alone, and any batch of it can be loaded without the ones
before: a resumed run continues where it was, and worker processes change nothing.
"""

import random
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kontext.data.cache import Kind, Latents, read_latents, read_text
from kontext.data.encode import jobs_of, load
from kontext.data.fingerprints import digest
from kontext.data.items import Item, Skips
from kontext.data.plan import Block, Entry, Part, Status, check_caches, plan_blocks
from kontext.errors import UserError

COMMANDS: Mapping[Kind, str] = {"latents": "cache-latents", "text": "cache-text"}
NEEDED: Mapping[Kind, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "latents": (("vae",), ()),
    "text": (("text_encoder1", "text_encoder2"), ("tokenizer1", "tokenizer2")),
}
"""Options of these commands: weights, and what may go with them."""


@dataclass(frozen=True)
class Batch:
    """Items of equal sizes. B items, C latent channels, h and w an eighth of the pixels, T text tokens.

    latents (B, C, h, w); references (B, C, h', w') each, none for text-to-image; txt (B, T, D); vector (B, V);
    keys: the items' names; masks (B, 1, h, w): weights of the loss in 0..1, None when no item has a mask.
    """

    latents: Tensor
    references: tuple[Tensor, ...]
    txt: Tensor
    vector: Tensor
    keys: tuple[str, ...]
    masks: Tensor | None = None


@dataclass(frozen=True)
class Group:
    """Entries that can share a batch."""

    entries: tuple[Entry, ...]
    batch_size: int
    repeats: int


class Batches:
    """The batches of a dataset file, by epoch and index. Safe to copy into worker processes."""

    def __init__(self, groups: Sequence[Group], *, seed: int, vary: bool = True, sources: str = "") -> None:
        """vary: choose captions, and whether references are left out, anew each time; otherwise the first and never.

        sources: a hash of what the caches were made from, as far as that is known.
        """
        self.groups = tuple(groups)
        self.seed = seed
        self.vary = vary
        self.sources = sources
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
        entries = self.order(epoch)[index]
        captions = [
            choose_caption(entry.item, f"{self.seed}/{epoch}/{index}/{row}")
            if self.vary
            else entry.item.caption
            for row, entry in enumerate(entries)
        ]
        batch = load_batch(entries, captions)
        alone = self.vary and goes_alone(entries[0].item, f"{self.seed}/{epoch}/{index}")
        return replace(batch, references=()) if alone else batch


def goes_alone(item: Item, seed: str) -> bool:
    """Whether a batch of such items is shown without references: all of a batch have the same number of them."""
    return bool(item.control_dropout) and random.Random(f"control/{seed}").random() < item.control_dropout


def choose_caption(item: Item, seed: str) -> str:
    """One of the item's captions, each as likely, or with the likelihood of its dropout the empty prompt."""
    if not (item.others or item.dropout):
        return item.caption
    source = random.Random(f"caption/{seed}")
    if source.random() < item.dropout:
        return ""
    return source.choice((item.caption, *item.others))


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


def load_batch(entries: Sequence[Entry], captions: Sequence[str]) -> Batch:
    """The cached tensors of entries of equal sizes, each with one of its captions."""
    latents = [read_latents(entry.latents) for entry in entries]
    texts = [read_text(entry.text, caption) for entry, caption in zip(entries, captions, strict=True)]
    references = zip(*(each.references for each in latents), strict=True)
    return Batch(
        latents=torch.stack([each.target for each in latents]),
        references=tuple(torch.stack(same) for same in references),
        txt=torch.stack([each.txt for each in texts]),
        vector=torch.stack([each.vector for each in texts]),
        keys=tuple(entry.item.key for entry in entries),
        masks=_stacked_masks(latents),
    )


def _stacked_masks(latents: Sequence[Latents]) -> Tensor | None:
    """An item without a mask counts everywhere."""
    if all(each.mask is None for each in latents):
        return None
    return torch.stack(
        [torch.ones_like(each.target[:1]) if each.mask is None else each.mask for each in latents]
    )


def open_batches(
    path: Path,
    *,
    seed: int,
    skips: Skips,
    encoders: Mapping[str, Path | None] | None = None,
    part: Part = "training",
) -> Batches:
    """The batches of a part of a dataset file whose caches are complete and up to date; none without blocks in it.

    Items whose pictures are unreadable go to `skips`, as when caching. encoders: option names and paths (`vae`,
    `text_encoder1` ...) for the command lines in the message.

    Raises UserError with the commands to run when something is missing from the caches or stale.
    """
    blocks = plan_blocks(path, skips, part)
    entries = [entry for block in blocks for entry in block.entries]
    latents = dict(zip(entries, check_caches(entries, "latents"), strict=True))
    skipped = set(_unreadable([entry for entry in entries if latents[entry].problem], skips))
    entries = [entry for entry in entries if entry not in skipped]
    texts = dict(zip(entries, check_caches(entries, "text"), strict=True))
    found: dict[Kind, list[Status]] = {
        "latents": [latents[entry] for entry in entries],
        "text": list(texts.values()),
    }
    complaints = [_complaint(kind, statuses, path, encoders or {}) for kind, statuses in found.items()]
    if any(complaints):
        raise UserError("\n".join([f"{path}: the caches are not ready.", *filter(None, complaints)]))
    if blocks and not entries:
        raise UserError(
            f"{path}: no picture can be used; the first is skipped because: {skips.rows[0].reason}"
        )
    return Batches(
        [group for block in blocks for group in _group(block, texts)],
        seed=seed,
        vary=part == "training",
        sources=digest(" ".join(_sources([latents[e] for e in entries] + list(texts.values()))).encode()),
    )


def _sources(statuses: Iterable[Status]) -> Iterator[str]:
    """Hashes of the encoders, pictures and masks behind cache files."""
    for status in statuses:
        if status.header and (record := status.header.record):
            stamps = (*record.sources, record.mask) if record.mask else record.sources
            yield from (record.encoder, *(stamp.content for stamp in stamps))


def _unreadable(entries: Sequence[Entry], skips: Skips) -> list[Entry]:
    """The entries without cache, when the reason is that none of them can be used: caching has skipped them.

    As soon as one can be used, caching has not been run, and the others need not be tried.
    """
    found = []
    for entry in entries:
        try:
            for job in jobs_of(entry):
                load(job)
        except UserError as error:
            found.append((entry, str(error)))
        else:
            break
    for entry, reason in found:
        skips.add(entry.item.image, reason)
    return [entry for entry, _ in found]


def _complaint(
    kind: Kind, statuses: Sequence[Status], path: Path, encoders: Mapping[str, Path | None]
) -> str | None:
    """What is wrong with the caches of one kind, and the command that puts it right; None when they are ready.

    Caches of two encoders are what an interrupted re-encoding leaves.
    """
    what = "latents" if kind == "latents" else "text embeddings"
    problems = Counter(status.problem for status in statuses if status.problem).most_common()
    used = {status.header.record.encoder for status in statuses if status.header and status.header.record}
    if problems:
        reasons = ", ".join(f"{count} {reason}" for reason, count in problems)
        text = f"{sum(count for _, count in problems)} of {len(statuses)} {what} must be encoded ({reasons})"
    elif len(used) > 1:
        text = f"the {what} were made with {len(used)} different encoders or settings"
    else:
        return None
    return f"{text}: run `{command(kind, path, encoders)}`."


def command(kind: Kind, path: Path, encoders: Mapping[str, Path | None]) -> str:
    """The command line that fills the cache; weights that are not known are left for the user to fill in."""
    weights, more = NEEDED[kind]
    words = ["kontext", COMMANDS[kind], "--dataset-config", str(path)]
    for name in (*weights, *(name for name in more if encoders.get(name))):
        words += [f"--{name.replace('_', '-')}", str(encoders.get(name) or name.upper())]
    return shlex.join(words)


def _group(block: Block, texts: Mapping[Entry, Status]) -> list[Group]:
    """Usable entries by sizes of target and references, and by the shapes of their text embeddings."""
    groups: dict[tuple[object, ...], list[Entry]] = {}
    for entry in block.entries:
        if entry in texts:
            header = texts[entry].header
            assert header is not None, "its status has no problem"
            shapes = (header.shapes["t5_vec"], header.shapes["clip_l_pooler"])
            groups.setdefault((entry.sizes, shapes), []).append(entry)
    size, repeats = block.dataset.batch_size, block.dataset.num_repeats
    return [Group(tuple(entries), size, repeats) for entries in groups.values()]
