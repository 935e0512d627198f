"""Makes the small Kontext in examples/small_world/models: tokenizers, autoencoder, transformer, text encoders.

Run from the repository's root: `python examples/make_base.py`. It needs no data: every picture is drawn. It
continues from its checkpoints in --work, and uses a GPU if there is one. Transformer and text encoders are trained by
the loop of `kontext train --network-module none`; --quick runs everything with two steps a stage, to see that it works.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from small_world import autoencoder as stage_a
from small_world import base as stage_b
from small_world import learning, scenes
from small_world.files import write_models
from small_world.measure import Score, follow, score
from small_world.pictures import to_bytes, to_image
from small_world.sheet import sheet
from small_world.tokenizers import write_clip_tokenizer, write_t5_tokenizer

from kontext.allocation import reuse_freed_memory
from kontext.console import say, table

HERE = Path(__file__).parent
QUICK = {"autoencoder_steps": 2, "decoder_steps": 2, "pictures": 32, "steps": 2, "edits": 32, "scored": 2}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=HERE / "small_world" / "models")
    parser.add_argument("--work", type=Path, default=HERE / "out" / "base", help="checkpoints and the sheet")
    parser.add_argument("--autoencoder-steps", type=int, default=2400)
    parser.add_argument("--decoder-steps", type=int, default=6000, help="with the encoder fixed")
    parser.add_argument("--pictures", type=int, default=6000, help="drawn for the autoencoder")
    parser.add_argument("--steps", type=int, default=5600, help="of the transformer and the text encoders")
    parser.add_argument("--edits", type=int, default=4000, help="encoded before stage B")
    parser.add_argument("--scored", type=int, default=32, help="held-out scenes of each kind of edit")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="two steps a stage, few pictures")
    options = parser.parse_args()
    return argparse.Namespace(**vars(options) | QUICK) if options.quick else options


def make_autoencoder(options: argparse.Namespace) -> stage_a.Autoencoder:
    """Stage A, finished: both halves together, standardised latents, then the decoder alone."""
    pool = stage_a.pictures(0, options.pictures)
    device, work = torch.device(options.device), options.work
    model = stage_a.train(
        pool, steps=options.autoencoder_steps, device=device, checkpoint=work / "autoencoder.pt", say=say
    )
    stage_a.standardise(model, pool[:512])
    model = stage_a.refine(model, pool, steps=options.decoder_steps, checkpoint=work / "decoder.pt", say=say)
    error = stage_a.measure(model, stage_a.pictures(scenes.HELD_OUT, max(1, options.pictures // 20)))
    say(f"autoencoder: mean error {error:.2f} of 255 on held-out pictures")
    return model


def make_world(
    options: argparse.Namespace,
    autoencoder: stage_a.Autoencoder,
    words: stage_b.Words,
    sizes: tuple[int, int],
) -> stage_b.SmallWorld:
    """Stage B. `sizes` are vocabularies."""
    torch.manual_seed(0)
    return learning.train(
        stage_b.make_pool(autoencoder, words, options.edits),
        stage_b.SmallWorld(*sizes),
        steps=options.steps,
        device=torch.device(options.device),
        folder=options.work,
    )


def report(scores: list[Score]) -> None:
    rows = [(s.kind, f"{s.nothing:.1f}", f"{s.autoencoder:.1f}", f"{s.model:.1f}") for s in scores]
    table("edit error of 255, held-out scenes", ("edit", "doing nothing", "autoencoder", "model"), rows)


def picture_sheet(
    world: stage_b.SmallWorld, autoencoder: stage_a.Autoencoder, words: stage_b.Words, path: Path
) -> None:
    """Two held-out scenes of each kind: reference, model, truth."""
    seeds = (scenes.HELD_OUT, scenes.HELD_OUT + 1)
    edits = [scenes.edit(seed, (kind,)) for kind in scenes.EDITS for seed in seeds]
    references = [scenes.draw(edit.reference) for edit in edits]
    pixels = torch.stack([to_bytes(picture) for picture in references])
    results = follow(world, autoencoder, words, pixels, [edit.instruction for edit in edits])
    cells = [
        [r, to_image(p), scenes.draw(e.target)] for r, p, e in zip(references, results, edits, strict=True)
    ]
    rows = [cells[i] + cells[i + 1] for i in range(0, len(cells), 2)]
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet(["reference", "edited", "truth"] * 2, rows).save(path)


def main() -> None:
    options = arguments()
    reuse_freed_memory()
    options.work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    sizes = (
        write_t5_tokenizer(options.output / "tokenizer_t5"),
        write_clip_tokenizer(options.output / "tokenizer_clip"),
    )
    words = stage_b.Words(options.output)
    autoencoder = make_autoencoder(options)
    world = make_world(options, autoencoder, words, sizes)
    write_models(options.output, autoencoder, world)
    report([score(kind, world, autoencoder, words, options.scored) for kind in scenes.EDITS])
    picture_sheet(world, autoencoder, words, options.work / "base.png")
    say(f"written to {options.output} after {(time.monotonic() - started) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
