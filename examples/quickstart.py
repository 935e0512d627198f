"""The quick start: teach the small Kontext a new edit and see that it learned it, in a few minutes on two CPU cores.

Runs kontext's commands on examples/: cache-latents, cache-text, train, generate with and without the LoRA, merge,
generate with the merged model. Prints the edit errors on held-out scenes and writes examples/out/quickstart.png.

    python examples/quickstart.py
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from PIL import Image
from small_world.pictures import edit_error, to_bytes
from small_world.scenes import COLORS, SIZE
from small_world.sheet import sheet

from kontext.console import say, table

ROOT = Path(__file__).resolve().parent.parent
WORK = Path("examples/out")
MODELS = Path("examples/small_world/models")
LORA = WORK / "lora" / "blueprint.safetensors"
MERGED = WORK / "merged" / "dit.safetensors"
T5, CLIP = MODELS / "t5.safetensors", MODELS / "clip.safetensors"
CPU = ("--device", "cpu", "--dtype", "float32")
DATASET = ("--dataset-config", "examples/dataset.toml")
ENCODERS = ("--text-encoder1", T5, "--text-encoder2", CLIP, "--t5-max-length", "8")
SHOWN = 4


def run(*arguments: object) -> None:
    """Run one command in a process of its own, as a user would, and say which."""
    words = [str(argument) for argument in arguments]
    say("$ " + " ".join(words).replace(sys.executable, "python"))
    subprocess.run(words, cwd=ROOT, check=True)


def kontext(command: str, *options: object) -> None:
    run(sys.executable, "-m", "kontext", command, *options)


def generate(name: str, dit: Path, *more: object) -> None:
    """Edit every held-out scene with `dit`, into WORK/name."""
    prompts = ("--from-file", WORK / "held_out" / "prompts.txt", "--no-resize-control", "--infer-steps", "10")
    models = ("--dit", dit, "--vae", MODELS / "ae.safetensors", *ENCODERS, *CPU)
    kontext("generate", *prompts, *models, "--save-path", WORK / name, "--output-name", name, *more)


def pictures(folder: Path) -> list[Image.Image]:
    """The PNG pictures of a folder, in order of their names."""
    return [Image.open(path).convert("RGB") for path in sorted((ROOT / folder).glob("*.png"))]


@dataclass(frozen=True)
class Errors:
    """Mean edit errors, 0..255, on the held-out scenes: of the whole picture, and of the drawn line alone."""

    picture: float
    line: float


def errors_of(results: list[Image.Image]) -> Errors:
    """Errors against the true pictures. Most of those is paper, so the line, which blank paper misses, counts apart."""
    before, truth = (pictures(WORK / "held_out" / name) for name in ("references", "truth"))
    return Errors(
        picture=_error(before, truth, results), line=_error([blank_paper()] * len(truth), truth, results)
    )


def _error(before: list[Image.Image], truth: list[Image.Image], results: list[Image.Image]) -> float:
    """Mean error of results where truth differs from before."""
    return mean(edit_error(*map(to_bytes, three)) for three in zip(before, truth, results, strict=True))


def blank_paper() -> Image.Image:
    return Image.new("RGB", (SIZE, SIZE), COLORS["blue"])


def write_sheet(path: Path, columns: dict[str, list[Image.Image]], errors: dict[str, Errors]) -> None:
    """One column per method, one row per scene, the errors below."""
    rows = [list(row) for row in zip(*(column[:SHOWN] for column in columns.values()), strict=True)]
    notes = [f"error {errors[name].picture:.1f}" if name in errors else "" for name in columns]
    sheet(list(columns), rows, notes).save(path)


def main() -> dict[str, Errors]:
    """Run everything; returns the errors of base, LoRA and merged model, and of blank paper to compare with."""
    started = time.monotonic()
    run(sys.executable, "examples/make_dataset.py", "--output", WORK)
    kontext("cache-latents", *DATASET, "--vae", MODELS / "ae.safetensors", "--batch-size", "16", *CPU)
    kontext("cache-text", *DATASET, *ENCODERS, *CPU)
    kontext("train", "--config-file", "examples/train.toml", "--device", "cpu")
    generate("base", MODELS / "dit.safetensors")
    generate("lora", MODELS / "dit.safetensors", "--lora-weight", LORA)
    kontext("merge", "--dit", MODELS / "dit.safetensors", "--lora-weight", LORA, "--output", MERGED, *CPU)
    generate("merged", MERGED)

    results = {name: pictures(WORK / name) for name in ("base", "lora", "merged")}
    errors = {name: errors_of(found) for name, found in results.items()}
    errors["blank paper"] = errors_of([blank_paper()] * len(results["base"]))
    rows = [(name, f"{e.picture:.1f}", f"{e.line:.1f}") for name, e in errors.items()]
    table("edit error of 255 on held-out scenes", ("model", "picture", "line alone"), rows)
    before, truth = (pictures(WORK / "held_out" / name) for name in ("references", "truth"))
    path = ROOT / WORK / "quickstart.png"
    write_sheet(path, {"reference": before, **results, "truth": truth}, errors)
    say(f"{path}  written after {time.monotonic() - started:.0f} s")
    return errors


if __name__ == "__main__":
    main()
