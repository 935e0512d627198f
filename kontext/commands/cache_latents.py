"""`kontext cache-latents`: pictures of a dataset to latents on disk."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kontext import console
from kontext.checkpoints import Source, load_autoencoder, open_source
from kontext.commands.caching import Work, find_work, finish
from kontext.data.encode import encode_latents
from kontext.data.fingerprints import weights_fingerprint
from kontext.data.items import Skips
from kontext.data.plan import Block, Entry, plan_blocks
from kontext.data.sheet import contact_sheet
from kontext.device import resolve_device, resolve_dtype
from kontext.errors import UserError
from kontext.files import atomic_write
from kontext.memory.tiling import tile
from kontext.model.autoencoder import Autoencoder
from kontext.model.latents import LATENT_FACTOR
from kontext.options.base import need
from kontext.options.cache import CacheLatents

PREPARATION = "lanczos 1"
"""How pictures are brought to size; another word here makes every cache stale."""


def run(options: CacheLatents) -> None:
    """Do what the options ask for."""
    skips = Skips(options.strict)
    if options.debug_mode:
        _show(plan_blocks(options.dataset_config, skips), options)
        skips.show()
        return
    need(options, "vae", because="to encode pictures")
    assert options.vae is not None
    encoder = _fingerprint(open_source(options.vae, "autoencoder"), options.vae_dtype)
    blocks = plan_blocks(options.dataset_config, skips)
    work = find_work(blocks, "latents", encoder=encoder, skip_existing=options.skip_existing)
    written = _encode(work, options, encoder, skips) if work.todo else []
    finish(work, written, skips, keep_cache=options.keep_cache)


def _fingerprint(source: Source, dtype: str) -> str:
    settings = {"preparation": PREPARATION, "dtype": dtype, "config": source.config}
    return weights_fingerprint(source.files, json.dumps(settings, sort_keys=True))


def _encode(work: Work, options: CacheLatents, encoder: str, skips: Skips) -> list[Entry]:
    """Encode what is to be done; tell what pictures of unusual kinds became."""
    workers = _workers(len(work.todo)) if options.num_workers is None else options.num_workers
    notes: dict[str, set[Path]] = {}
    written = []
    pictures = encode_latents(
        work.todo,
        _encoder(options),
        encoder=encoder,
        batch_size=options.batch_size,
        workers=workers,
        skips=skips,
    )
    with console.progress("Latents", total=len(work.todo), unit="item") as bar:
        for each in pictures:
            written.append(each.entry)
            for path, note in each.notes:
                notes.setdefault(note, set()).add(path)
            bar.advance()
    for note, paths in notes.items():
        console.notice(f"{note}: {len(paths)} pictures, {min(paths)}{' ...' if len(paths) > 1 else ''}")
    return written


def _workers(items: int) -> int:
    """Few pictures are read faster than processes start."""
    return min((os.cpu_count() or 1) - 1, 8, items // 8)


def _encoder(options: CacheLatents) -> Callable[[Tensor], Tensor]:
    device, dtype = resolve_device(options.device), resolve_dtype(options.vae_dtype)
    assert options.vae is not None
    autoencoder: Autoencoder = load_autoencoder(options.vae, device=device, dtype=dtype)
    if autoencoder.factor != LATENT_FACTOR:
        raise UserError(
            f"{options.vae}: shrinks pictures by {autoencoder.factor}; FLUX.1's autoencoder does by {LATENT_FACTOR}."
        )
    tile(autoencoder, options.vae_tiling)

    @torch.inference_mode()
    def encode(images: Tensor) -> Tensor:
        return autoencoder.encode(images.to(device, dtype))

    return encode


# ---- looking at the dataset ----


def _show(blocks: Sequence[Block], options: CacheLatents) -> None:
    entries = [entry for block in blocks for entry in block.entries]
    shown = entries[: options.debug_items]
    if options.debug_mode == "console":
        columns = ("target", "size", "becomes", "references", "become", "caption")
        console.table(f"{len(shown)} of {len(entries)} items", columns, [_row(e) for e in shown], asked=True)
        return
    with atomic_write(options.debug_output) as temporary:
        contact_sheet(shown).save(temporary, format="PNG")
    console.say(f"{len(shown)} of {len(entries)} items are on {options.debug_output}.")


def _row(entry: Entry) -> tuple[str, ...]:
    item = entry.item
    return (
        str(item.image),
        _size_text(entry.size),
        _size_text(entry.target),
        "\n".join(str(path) for path in item.controls) or "-",
        "\n".join(map(_size_text, entry.references)) or "-",
        item.caption,
    )


def _size_text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
