"""Speed and error of --step-cache on the small world: `python examples/measure_step_cache.py`.

Edits of held-out scenes, one picture at a time, with all steps and with each threshold in turn. Of the latents the
relative difference from those of all steps is told, of the pictures the error from the true edit (0 to 255), as in the
README. The small model has one double and five single blocks: with FLUX's 57 a skipped step costs less still.

Options: --pictures n (24), --steps n (25).
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from small_world import scenes
from small_world.pictures import edit_error, to_bytes
from torch import Tensor

from kontext.denoiser import Denoiser
from kontext.flow import schedule
from kontext.generation.parts import ModelFiles, Runtime
from kontext.generation.pipeline import Kontext
from kontext.generation.request import Request
from kontext.generation.step_cache import StepCache
from kontext.model.latents import PIXELS_PER_TOKEN, draw_noise
from kontext.sampler import euler

MODELS = Path(__file__).resolve().parent / "small_world" / "models"
THRESHOLDS = (0.0, 0.04, 0.08, 0.12, 0.2, 0.3)


@dataclass(frozen=True)
class Measured:
    """Of one picture at one threshold: seconds, the share of skipped steps, and the two errors."""

    seconds: float
    skipped: float
    latent: float
    picture: float


def small_kontext() -> Kontext:
    paths = (MODELS / f"{name}.safetensors" for name in ("dit", "ae", "t5", "clip"))
    files = ModelFiles(*paths, MODELS / "tokenizer_t5", MODELS / "tokenizer_clip")
    return Kontext(files, Runtime(torch.device("cpu"), torch.float32, t5_max_length=8, keep=True))


@torch.no_grad()
def measure(kontext: Kontext, seed: int, steps: int) -> list[Measured]:
    """One edit at each threshold, the first of which skips nothing."""
    edit = scenes.edit(scenes.HELD_OUT + seed)
    before, truth = scenes.draw(edit.reference), scenes.draw(edit.target)
    request = Request(edit.instruction, (before,), seed=seed, steps=steps, resize_references=False)
    conditioned = kontext.condition(kontext.frame(request))
    framed = conditioned.framed
    noise = draw_noise(seed, framed.height, framed.width)
    sigmas = schedule(steps, framed.height * framed.width // PIXELS_PER_TOKEN**2)
    found: list[Measured] = []
    whole: Tensor | None = None
    for threshold in THRESHOLDS:
        side = Denoiser(kontext.transformer(), conditioned.positive)
        side.prepare(sigmas[:-1])
        cache = StepCache(side.transformer, threshold)
        side.trunk = cache if threshold else side.trunk
        start = time.perf_counter()
        latent = euler(side, noise, sigmas)
        seconds = time.perf_counter() - start
        whole = latent if whole is None else whole
        error = edit_error(*map(to_bytes, (before, truth, kontext.decode(latent))))
        away = float((latent - whole).norm() / whole.norm())
        found.append(Measured(seconds, cache.skipped / steps, away, error))
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--steps", type=int, default=25)
    options = parser.parse_args(arguments)
    kontext = small_kontext()
    measure(kontext, 0, options.steps)  # to warm up
    rows = [measure(kontext, seed, options.steps) for seed in range(options.pictures)]
    print(f"\n{options.pictures} edits, {options.steps} steps, {torch.get_num_threads()} threads\n")
    print("| `--step-cache` | steps skipped | times as fast | latents differ by | error of the edit |")
    print("|---|---|---|---|---|")
    for i, threshold in enumerate(THRESHOLDS):
        speed = statistics.median(row[0].seconds / row[i].seconds for row in rows)
        skipped, latent, picture = (
            statistics.mean(getattr(row[i], name) for row in rows)
            for name in ("skipped", "latent", "picture")
        )
        print(f"| {threshold:g} | {skipped:.0%} | {speed:.2f} | {latent:.3f} | {picture:.1f} |")


if __name__ == "__main__":
    main()
