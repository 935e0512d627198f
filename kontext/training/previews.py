"""Sample pictures in the course of training, made exactly as `kontext generate` makes them."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

from PIL import Image

from kontext import console
from kontext.data.images import read_picture
from kontext.generation.outputs import save_picture, settings_of
from kontext.generation.pipeline import Conditioned, Kontext
from kontext.generation.request import Request
from kontext.training.loop import Outcome
from kontext.training.names import Names
from kontext.training.plan import Plan
from kontext.training.team import Team

FOLDER = "sample"
CELL = 512  # pixels: the height of a row of the grid
GAP = 8
STEPS, GUIDANCE = 20, 2.5

Drawn = Callable[[int, str, Sequence[Path]], None]
"""Called with the number of steps done, the mark in the files' names, and the sample pictures by prompt."""


@dataclass(frozen=True)
class Rhythm:
    """When to sample: at the start, every so many steps, every so many epochs."""

    at_first: bool = False
    every_steps: int | None = None
    every_epochs: int | None = None

    def label(self, step: int, plan: Plan) -> str | None:
        """How files of samples after step `step` (from 0) are marked, or None if none are due.

        A step that ends an epoch makes one set of samples, not two.
        """
        epoch = plan.epoch(step) + 1
        if self.every_epochs and plan.ends_epoch(step) and epoch % self.every_epochs == 0:
            return f"e{epoch:06d}"
        return f"{step + 1:06d}" if self.every_steps and (step + 1) % self.every_steps == 0 else None


@dataclass(frozen=True)
class Sample:
    """A sample to draw again and again, with everything but the transformer's part done."""

    conditioned: Conditioned
    references: tuple[Image.Image, ...]

    @property
    def request(self) -> Request:
        return self.conditioned.framed.request


def prepare(kontext: Kontext, requests: Sequence[Request]) -> list[Sample]:
    """Encodes references and prompts once; the text encoders are freed, the autoencoder waits on the CPU.

    Raises UserError for an unreadable reference.
    """
    framed = [kontext.frame(request) for request in requests]
    conditioned = [kontext.condition(frame) for frame in framed]
    kontext.text_encoders.free()
    kontext.autoencoder().cpu()
    return [Sample(done, tuple(_references(done.framed.request))) for done in conditioned]


def _references(request: Request) -> list[Image.Image]:
    return [
        read_picture(reference).image if isinstance(reference, Path) else reference
        for reference in request.references
    ]


class Previews:
    """Listens to the loop and samples when it is due, with the transformer in training itself."""

    def __init__(
        self,
        kontext: Kontext,
        samples: Sequence[Sample],
        *,
        plan: Plan,
        rhythm: Rhythm,
        team: Team,
        weights: Callable[[], AbstractContextManager[None]],
        names: Names,
        drawn: Drawn,
    ) -> None:
        """weights: within it what is trained has the weights to be used, which may not be those in training.

        Every process of the team has all samples, draws its part of them, and the first one writes them.
        """
        self.kontext = kontext
        self.samples = samples
        self.plan = plan
        self.rhythm = rhythm
        self.team = team
        self.weights = weights
        self.folder = names.folder / FOLDER
        self.name = names.stem
        self.drawn = drawn

    def __call__(self, outcome: Outcome) -> None:
        label = self.rhythm.label(outcome.step, self.plan)
        if label is not None:
            self.draw(label, outcome.step + 1)

    def draw(self, label: str, done: int) -> None:
        """Makes all samples after `done` steps and writes each, and a grid of them.

        Nothing of training changes: dropout is off meanwhile, and no global random numbers are drawn.
        """
        parts = self.team.gather(self._pictures())
        if self.team.leads:
            pictures = {number: picture for part in parts for number, picture in part.items()}
            self._write([pictures[number] for number in range(len(self.samples))], label, done)

    def _pictures(self) -> dict[int, Image.Image]:
        """This process' part of the samples, by number."""
        mine = self.team.deal(len(self.samples))
        transformer = self.kontext.transformer()
        training = transformer.training
        transformer.eval()
        with self.weights():
            uses = [partial(self.kontext.denoise, self.samples[number].conditioned) for number in mine]
            latents = [self.team.run(use) for use in uses]
        transformer.train(training)
        autoencoder = self.kontext.autoencoder().to(self.kontext.runtime.device)
        pictures = [
            self.kontext.finish(self.samples[number].conditioned.framed, latent)
            for number, latent in zip(mine, latents, strict=True)
        ]
        autoencoder.cpu()
        return dict(zip(mine, pictures, strict=True))

    def _write(self, pictures: Sequence[Image.Image], label: str, done: int) -> None:
        now, paths = f"{datetime.now():%Y%m%d%H%M%S}", []
        for i, (sample, picture) in enumerate(zip(self.samples, pictures, strict=True)):
            framed = sample.conditioned.framed
            name = f"{self.name}_{label}_{i:02d}_{now}_{sample.request.seed}_000.png"
            settings = settings_of(sample.request, framed.width, framed.height)
            save_picture(self.folder / name, picture, settings)
            paths.append(self.folder / name)
        rows = [(*s.references, picture) for s, picture in zip(self.samples, pictures, strict=True)]
        path = self.folder / f"{self.name}_{label}_grid.png"
        save_picture(path, grid(rows), {})
        console.say(f"Samples: {path}")
        self.drawn(done, label, paths)


def grid(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Pictures row by row (references, then the sample), all of one height, on white."""
    cell = min(CELL, max(row[-1].height for row in rows))
    scaled = [[_to_height(picture, cell) for picture in row] for row in rows]
    width = max(sum(picture.width + GAP for picture in row) for row in scaled) + GAP
    sheet = Image.new("RGB", (width, len(rows) * (cell + GAP) + GAP), "white")
    for number, row in enumerate(scaled):
        left = GAP
        for picture in row:
            sheet.paste(picture, (left, GAP + number * (cell + GAP)))
            left += picture.width + GAP
    return sheet


def _to_height(picture: Image.Image, height: int) -> Image.Image:
    width = max(1, round(picture.width * height / picture.height))
    return picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
