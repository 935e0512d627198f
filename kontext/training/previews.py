"""Sample pictures in the course of training, made exactly as `kontext generate` makes them."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

from PIL import Image
from torch import Tensor

from kontext import console
from kontext.data.images import read_picture
from kontext.generation.outputs import save_picture, settings_of
from kontext.generation.pipeline import Kontext
from kontext.generation.request import Request
from kontext.generation.stages import Conditioned, Framed
from kontext.training.interrupts import Stop, never
from kontext.training.loop import Outcome
from kontext.training.names import Names
from kontext.training.plan import Plan
from kontext.training.team import Team
from kontext.training.validation import evaluating

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
    """A sample to draw again and again, with everything but the transformer's part done.

    conditioned: None when another process draws it.
    """

    request: Request
    references: tuple[Image.Image, ...]
    conditioned: Conditioned | None


class _Stopped(Exception):
    """The run is to end in the middle of a picture."""


Made = tuple[Image.Image, Mapping[str, str]]
"""A finished picture and the settings that go into its file."""


def prepare(kontext: Kontext, requests: Sequence[Request], mine: Collection[int]) -> list[Sample]:
    """Encodes references and prompts once; the text encoders are freed, the autoencoder waits on the CPU.

    mine: which of the requests this process draws. Those of others are not encoded, and no model is loaded for them.

    Raises UserError for an unreadable reference.
    """
    framed = {number: kontext.frame(requests[number]) for number in mine}
    conditioned = {number: kontext.condition(frame) for number, frame in framed.items()}
    if mine:
        kontext.text_encoders.free()
        kontext.autoencoder().cpu()
    return [
        Sample(request, tuple(_references(request)), conditioned.get(number))
        for number, request in enumerate(requests)
    ]


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

        Every process of the team has all samples, draws those that it has conditioned, and the first one writes them.
        All know when the last ones were `broken_off`.
        """
        self.kontext = kontext
        self.samples = samples
        self.plan = plan
        self.rhythm = rhythm
        self.team = team
        self.weights = weights
        self.broken_off = False
        self.folder = names.samples
        self.name = names.stem
        self.drawn = drawn

    def begin(self, done: int, stop: Stop = never) -> None:
        """Before the first step, when `done` are done already: draws the samples of the start, or those that were due
        when the run that goes on was broken off.

        Raises KeyboardInterrupt when the run is to end meanwhile.
        """
        if done == 0:
            label = f"{0:06d}" if self.rhythm.at_first else None
        else:
            label = self.rhythm.label(done - 1, self.plan)
            missing = bool(label) and not self._grid(label).exists()
            label = label if self.team.gather(missing)[0] else None
        if label is not None and not self.draw(label, done, stop):
            raise KeyboardInterrupt

    def __call__(self, outcome: Outcome, stop: Stop = never) -> None:
        label = self.rhythm.label(outcome.step, self.plan)
        if label is not None:
            self.draw(label, outcome.step + 1, stop)

    def draw(self, label: str, done: int, stop: Stop = never) -> bool:
        """Makes all samples after `done` steps and writes each, and a grid of them; False if it was broken off.

        Nothing of training changes: dropout is off meanwhile, and no global random numbers are drawn.
        stop: is asked between steps, but for processes that need one another for each step.
        """
        parts = self.team.gather(self._pictures(never if self.team.together else stop))
        made = {number: one for part in parts for number, one in part.items()}
        complete = len(made) == len(self.samples)
        self.broken_off = not complete
        if self.team.leads and complete:
            self._write([made[number] for number in range(len(self.samples))], label, done)
        elif self.team.leads:
            console.notice(
                f"The samples after step {done} are broken off. They are drawn when the run goes on."
            )
        return complete

    def _pictures(self, stop: Stop) -> dict[int, Made]:
        """This process' part of the samples, by number; none if the run is to end."""
        mine = {number: s.conditioned for number, s in enumerate(self.samples) if s.conditioned}
        if not mine:
            return {}
        try:
            latents = self._latents(list(mine.values()), stop)
        except _Stopped:
            return {}
        autoencoder = self.kontext.autoencoder().to(self.kontext.runtime.device)
        made = {
            number: self._made(conditioned.framed, latent)
            for (number, conditioned), latent in zip(mine.items(), latents, strict=True)
        }
        autoencoder.cpu()
        return made

    def _latents(self, wanted: Sequence[Conditioned], stop: Stop) -> list[Tensor]:
        """Raises _Stopped between two steps."""

        def watch(step: int, latents: Tensor) -> None:
            if stop():
                raise _Stopped

        with evaluating(self.kontext.transformer()), self.weights():
            uses = [partial(self.kontext.denoise, conditioned, watch) for conditioned in wanted]
            return [self.team.run(use) for use in uses]

    def _made(self, framed: Framed, latent: Tensor) -> Made:
        settings = settings_of(framed.request, framed.width, framed.height)
        return self.kontext.finish(framed, latent), settings

    def _grid(self, label: str) -> Path:
        """What is written last of all samples."""
        return self.folder / f"{self.name}_{label}_grid.png"

    def _write(self, made: Sequence[Made], label: str, done: int) -> None:
        now, paths = f"{datetime.now():%Y%m%d%H%M%S}", []
        for i, (sample, (picture, settings)) in enumerate(zip(self.samples, made, strict=True)):
            name = f"{self.name}_{label}_{i:02d}_{now}_{sample.request.seed}_000.png"
            save_picture(self.folder / name, picture, settings)
            paths.append(self.folder / name)
        rows = [(*s.references, picture) for s, (picture, _) in zip(self.samples, made, strict=True)]
        path = self._grid(label)
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
