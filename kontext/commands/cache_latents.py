"""`kontext cache-latents`: pictures of a dataset to latents on disk."""

import json
import os
from collections.abc import Callable

import torch
from torch import Tensor

from kontext import console
from kontext.checkpoints import Source, load_autoencoder, open_source
from kontext.commands.caching import Done, Work, find_work, finish
from kontext.data.encode import encode_latents
from kontext.data.fingerprints import weights_fingerprint
from kontext.data.items import Skips
from kontext.data.plan import Entry, plan_blocks
from kontext.data.sheet import contact_sheet
from kontext.device import resolve_device, told_precision
from kontext.errors import UserError
from kontext.files import atomic_write
from kontext.memory.tiling import tile
from kontext.model.autoencoder import Autoencoder
from kontext.model.latents import LATENT_FACTOR
from kontext.options.base import need
from kontext.options.cache import CacheLatents
from kontext.processes import Processes, joined

PREPARATION = "lanczos 1"
"""How pictures are brought to size; another word here makes every cache stale."""


def run(options: CacheLatents) -> None:
    """Do what the options ask for, together with the other processes of the launch."""
    with joined() as crew:
        if options.debug_mode:
            crew.first(lambda: _show(options))
        else:
            _fill(options, crew)


def _fill(options: CacheLatents, crew: Processes) -> None:
    need(options, "vae", because="to encode pictures")
    vae, done = options.vae, Done(Skips(options.strict))
    assert vae is not None
    encoder = crew.first(lambda: _fingerprint(open_source(vae, "autoencoder"), options.vae_dtype))
    work = find_work(
        options.dataset_config,
        "latents",
        done.skips,
        crew,
        encoder=encoder,
        skip_existing=options.skip_existing,
    )
    if work.mine:
        _encode(work, options, encoder, done, crew)
    finish(work, done, crew, keep_cache=options.keep_cache)


def _fingerprint(source: Source, dtype: str) -> str:
    settings = {"preparation": PREPARATION, "dtype": dtype, "config": source.config}
    return weights_fingerprint(source.files, json.dumps(settings, sort_keys=True))


def _encode(work: Work, options: CacheLatents, encoder: str, done: Done, crew: Processes) -> None:
    """Encode this process' share, and note in `done` what was written and what became of unusual pictures."""
    workers = _workers(len(work.mine), crew.here) if options.num_workers is None else options.num_workers
    pictures = encode_latents(
        work.mine,
        _encoder(options),
        encoder=encoder,
        batch_size=options.batch_size,
        workers=workers,
        skips=done.skips,
    )
    with console.progress("Latents", total=len(work.mine), unit="item") as bar:
        for each in pictures:
            done.written.append(each.entry)
            for path, note in each.notes:
                done.notes.setdefault(note, set()).add(path)
            bar.advance()


def _workers(items: int, here: int) -> int:
    """Few pictures are read faster than processes start. here: processes of the launch that share the processors."""
    return min(max((os.cpu_count() or 1) // here - 1, 0), 8, items // 8)


def _encoder(options: CacheLatents) -> Callable[[Tensor], Tensor]:
    device = resolve_device(options.device)
    precision = told_precision(options.vae_dtype, device, "--vae-dtype")
    assert options.vae is not None
    autoencoder: Autoencoder = load_autoencoder(options.vae, device=device, dtype=precision.computing)
    if autoencoder.factor != LATENT_FACTOR:
        raise UserError(
            f"{options.vae}: shrinks pictures by {autoencoder.factor}; FLUX.1's autoencoder does by {LATENT_FACTOR}."
        )
    tile(autoencoder, options.vae_tiling)

    @torch.inference_mode()
    def encode(images: Tensor) -> Tensor:
        return autoencoder.encode(images.to(device, precision.computing)).to(precision.kept)

    return encode


# ---- looking at the dataset ----


def _show(options: CacheLatents) -> None:
    skips = Skips(options.strict)
    entries = [entry for block in plan_blocks(options.dataset_config, skips) for entry in block.entries]
    shown = entries[: options.debug_items]
    if options.debug_mode == "console":
        columns = ("target", "size", "becomes", "references", "become", "caption")
        console.table(f"{len(shown)} of {len(entries)} items", columns, [_row(e) for e in shown], asked=True)
    else:
        with atomic_write(options.debug_output) as temporary:
            contact_sheet(shown).save(temporary, format="PNG")
        console.say(f"{len(shown)} of {len(entries)} items are on {options.debug_output}.")
    skips.show()


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
