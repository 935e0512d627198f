"""What `cache-latents` and `cache-text` have in common: what is to be done, and what was done."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kontext import console
from kontext.data.cache import Kind, delete_stale
from kontext.data.items import Skips
from kontext.data.plan import Block, Entry, Status, check_caches, identity, plan_blocks
from kontext.processes import Processes


@dataclass(frozen=True)
class Work:
    """All entries of one kind of cache, those of them that must be encoded, and this process' share of these."""

    kind: Kind
    blocks: Sequence[Block]
    todo: Sequence[Entry]
    mine: Sequence[Entry]


@dataclass
class Done:
    """What a process has done: the entries written, what was left out, and what was done to pictures, by note."""

    skips: Skips
    written: list[Entry] = field(default_factory=list)
    notes: dict[str, set[Path]] = field(default_factory=dict)


def find_work(
    path: Path, kind: Kind, skips: Skips, crew: Processes, *, encoder: str, skip_existing: bool
) -> Work:
    """Compare the caches of a dataset file with what should be in them, and say what is to be done.

    skip_existing: leave alone what is up to date; otherwise everything is encoded again.
    """

    def look() -> tuple[Sequence[Block], list[Entry]]:
        blocks = plan_blocks(path, skips)
        return blocks, _find(blocks, kind, encoder=encoder, skip_existing=skip_existing)

    blocks, todo = crew.first(look)
    return Work(kind, blocks, todo, crew.share(todo))


def _find(blocks: Sequence[Block], kind: Kind, *, encoder: str, skip_existing: bool) -> list[Entry]:
    entries = [entry for block in blocks for entry in block.entries]
    if not skip_existing:
        console.say(f"{len(entries)} items to encode.")
        return entries
    statuses = check_caches(entries, kind, encoder=encoder)
    todo = [entry for entry, status in zip(entries, statuses, strict=True) if status.problem]
    counts = Counter(status.problem for status in statuses if status.problem).most_common()
    what = ", ".join(f"{count} {reason}" for reason, count in counts)
    console.say(f"{len(todo)} of {len(entries)} items to encode{f' ({what})' if what else ''}.")
    _tell_foreign(statuses)
    return todo


def _tell_foreign(statuses: Sequence[Status]) -> None:
    ready = [status.header for status in statuses if status.header and not status.problem]
    foreign = sum(header.record is None for header in ready)
    if foreign:
        console.notice(
            f"{foreign} cache files were written by another program. They fit the pictures and captions and are "
            "used as they are; --no-skip-existing encodes them again."
        )


def finish(work: Work, done: Done, crew: Processes, *, keep_cache: bool) -> None:
    """When all processes are done, the first one deletes the cache files of items that are gone, and shows what was done."""
    parts = crew.gather(done)
    if crew.leads:
        _conclude(work, parts, keep_cache=keep_cache)


def _conclude(work: Work, parts: Sequence[Done], *, keep_cache: bool) -> None:
    done, todo = {entry for part in parts for entry in part.written}, set(work.todo)
    rows = []
    for block in work.blocks:
        deleted = 0 if keep_cache else _delete_stale(block, work.kind)
        fresh = sum(entry not in todo for entry in block.entries)
        encoded = sum(entry in done for entry in block.entries)
        rows.append((str(block.dataset.source), len(block.entries), encoded, fresh, deleted))
    for note in sorted({note for part in parts for note in part.notes}):
        paths = set().union(*(part.notes.get(note, ()) for part in parts))
        console.notice(f"{note}: {len(paths)} pictures, {min(paths)}{' ...' if len(paths) > 1 else ''}")
    Skips(rows=[row for part in parts for row in part.skips.rows]).show()
    title = "Latents" if work.kind == "latents" else "Text embeddings"
    console.table(title, ("dataset", "items", "written", "up to date", "deleted"), rows)


def _delete_stale(block: Block, kind: Kind) -> int:
    folder = block.dataset.cache_folder
    keep = {entry.latents if kind == "latents" else entry.text for entry in block.entries}
    deleted = delete_stale(folder, kind, dataset=identity(block.dataset), keep=keep, keep_keys=block.unusable)
    return len(deleted)
