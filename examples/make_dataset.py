"""Makes the dataset of a new edit, "turn it into a blueprint", which the small base model has never seen.

Writes reference and target pictures with captions for training, and held-out references with their true pictures
and a prompt file for `kontext generate --from-file`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image
from small_world.scenes import COLORS, HELD_OUT, OVERSAMPLING, Scene, canvas, draw, finish, outline, scene

INSTRUCTION = "turn it into a blueprint"
LINE = 4
FIRST_SEED = 500_000_000


def blueprint(drawn: Scene) -> Image.Image:
    """The scene as a drawing: blue paper, the object's outline in white."""
    image, pen = canvas(COLORS["blue"])
    corners = outline(drawn)
    pen.line((*corners, *corners[:2]), COLORS["white"], LINE * OVERSAMPLING, joint="curve")
    return finish(image)


def write_training(folder: Path, count: int) -> None:
    """`folder`/references and `folder`/targets, each target with its caption file."""
    for index in range(count):
        drawn = scene(FIRST_SEED + index)
        name = f"{index:03d}"
        for kind, picture in (("references", draw(drawn)), ("targets", blueprint(drawn))):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            picture.save(folder / kind / f"{name}.png")
        (folder / "targets" / f"{name}.txt").write_text(INSTRUCTION + "\n", encoding="utf-8")


def write_held_out(folder: Path, count: int) -> None:
    """`folder`/references, `folder`/truth and `folder`/prompts.txt, one line per scene."""
    lines = []
    for index in range(count):
        drawn = scene(HELD_OUT + index)
        for kind, picture in (("references", draw(drawn)), ("truth", blueprint(drawn))):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            picture.save(folder / kind / f"{index:03d}.png")
        lines.append(f"{INSTRUCTION} --d {index} --ci {folder / 'references' / f'{index:03d}.png'}")
    (folder / "prompts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("examples/out"))
    parser.add_argument("--count", type=int, default=240, help="scenes to train on")
    parser.add_argument("--held-out", type=int, default=8, help="scenes to measure on")
    options = parser.parse_args()
    write_training(options.output / "blueprint", options.count)
    write_held_out(options.output / "held_out", options.held_out)


if __name__ == "__main__":
    main()
