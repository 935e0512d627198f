"""What `cache-latents` and `cache-text` have in common: what is to be done, and what was done."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kontext import console
from kontext.data.cache import Kind, delete_stale
from kontext.data.items import Skips
from kontext.data.plan import Block, Entry, Status, check_caches, identity


@dataclass(frozen=True)
class Work:
    """All entries of one kind of cache, and those of them that must be encoded."""

    kind: Kind
    blocks: Sequence[Block]
    todo: Sequence[Entry]


def find_work(blocks: Sequence[Block], kind: Kind, *, encoder: str, skip_existing: bool) -> Work:
    """Compare the caches with what should be in them, and say what is to be done.

    skip_existing: leave alone what is up to date; otherwise everything is encoded again.
    """
    entries = [entry for block in blocks for entry in block.entries]
    if not skip_existing:
        console.say(f"{len(entries)} items to encode.")
        return Work(kind, blocks, entries)
    statuses = check_caches(entries, kind, encoder=encoder)
    todo = [entry for entry, status in zip(entries, statuses, strict=True) if status.problem]
    counts = Counter(status.problem for status in statuses if status.problem).most_common()
    what = ", ".join(f"{count} {reason}" for reason, count in counts)
    console.say(f"{len(todo)} of {len(entries)} items to encode{f' ({what})' if what else ''}.")
    _tell_foreign(statuses)
    return Work(kind, blocks, todo)


def _tell_foreign(statuses: Sequence[Status]) -> None:
    ready = [status.header for status in statuses if status.header and not status.problem]
    foreign = sum(header.record is None for header in ready)
    if foreign:
        console.notice(
            f"{foreign} cache files were written by another program. They fit the pictures and captions and are "
            "used as they are; --no-skip-existing encodes them again."
        )


def finish(work: Work, written: Sequence[Entry], skips: Skips, *, keep_cache: bool) -> None:
    """Delete the cache files of items that are gone, and show what was done."""
    done, todo = set(written), set(work.todo)
    rows = []
    for block in work.blocks:
        deleted = 0 if keep_cache else _delete_stale(block, work.kind)
        fresh = sum(entry not in todo for entry in block.entries)
        encoded = sum(entry in done for entry in block.entries)
        rows.append((str(block.dataset.source), len(block.entries), encoded, fresh, deleted))
    skips.show()
    title = "Latents" if work.kind == "latents" else "Text embeddings"
    console.table(title, ("dataset", "items", "written", "up to date", "deleted"), rows)


def _delete_stale(block: Block, kind: Kind) -> int:
    folder = block.dataset.cache_folder
    keep = {entry.latents if kind == "latents" else entry.text for entry in block.entries}
    deleted = delete_stale(folder, kind, dataset=identity(block.dataset), keep=keep, keep_keys=block.unusable)
    return len(deleted)
