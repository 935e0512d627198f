"""Many pictures, stage by stage: every large model is loaded once, and one bad item does not end the rest."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor

from kontext.console import progress
from kontext.generation.outputs import Writer, settings_of
from kontext.generation.pipeline import Kontext
from kontext.generation.request import Request
from kontext.generation.stages import ITEM_ERRORS, Conditioned, Framed
from kontext.generation.together import Together, seedless
from kontext.processes import ALONE, Processes

A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class Failure:
    """An item (numbered from 1) that did not become a picture, and why."""

    number: int
    prompt: str
    error: Exception


@dataclass(frozen=True)
class Finished:
    """A latent with the name that its files get."""

    framed: Framed
    latent: Tensor
    stem: str


class Batch:
    """The failures of a batch so far, and how a stage goes on past them."""

    def __init__(self, requests: Sequence[Request], numbers: Sequence[int]) -> None:
        self.requests = requests
        self.mine = {number: requests[number - 1] for number in numbers}
        self.failures: list[Failure] = []

    def each(self, stage: Callable[[int, A], B], items: dict[int, A]) -> dict[int, B]:
        """The stage's results by item number. An item that fails is taken out and remembered."""
        results = {}
        for number, item in items.items():
            try:
                results[number] = stage(number, item)
            except ITEM_ERRORS as error:
                self.failures.append(Failure(number, self.requests[number - 1].prompt, error))
        return results


def run_batch(
    kontext: Kontext, requests: Sequence[Request], writer: Writer, crew: Processes = ALONE
) -> list[Failure]:
    """Make and save what `writer` wants for each request, and return what failed.

    Of several processes each makes its share, under the numbers that one alone would give. A model that cannot be
    loaded ends the whole batch: its error is raised.
    """
    batch = Batch(requests, crew.share(range(1, len(requests) + 1)))
    if any(request.references for request in batch.mine.values()):
        kontext.autoencoder()
    framed = _frame_all(kontext, batch)
    conditioned = _condition_all(kontext, batch, framed) if framed else {}
    finished = _denoise_all(kontext, batch, conditioned, writer) if conditioned else {}
    if finished and writer.pictures:
        kontext.autoencoder()
        batch.each(lambda _, item: _decode(kontext, item, writer), finished)
    return batch.failures


def _frame_all(kontext: Kontext, batch: Batch) -> dict[int, Framed]:
    """Requests in a row that differ in nothing but the seed are framed once."""
    last: list[tuple[Request, Framed]] = []

    def frame(_: int, request: Request) -> Framed:
        alike = seedless(request)
        if last and last[0][0] == alike:
            return replace(last[0][1], request=request.seeded())
        framed = kontext.frame(request)
        last[:] = [(alike, framed)]
        return framed

    return batch.each(frame, batch.mine)


def _condition_all(kontext: Kontext, batch: Batch, framed: dict[int, Framed]) -> dict[int, Conditioned]:
    kontext.text_encoders()
    conditioned = batch.each(lambda _, item: kontext.condition(item), framed)
    kontext.release(kontext.text_encoders)
    return conditioned


class _Making:
    """The items in the making: their names, given when first needed, and looks at them, if wanted."""

    def __init__(
        self, kontext: Kontext, batch: Batch, items: Mapping[int, Conditioned], writer: Writer
    ) -> None:
        self.requests = {number: item.framed.request for number, item in items.items()}
        self.kontext, self.writer, self.count = kontext, writer, len(batch.requests)
        self.stems: dict[int, str] = {}
        if writer.preview:
            kontext.colours()  # before the transformer takes the memory

    @property
    def steps(self) -> int:
        return sum(request.steps - request.skipped_steps for request in self.requests.values())

    def stem(self, number: int) -> str:
        if number not in self.stems:
            self.stems[number] = self.writer.stem(number, self.count, self.requests[number].seed)
        return self.stems[number]

    def look(self, number: int, step: int, latent: Tensor) -> None:
        if self.writer.preview and (step + 1) % self.writer.preview == 0:
            self.writer.save_look(self.stem(number), self.kontext.look(latent))


def _denoise_all(
    kontext: Kontext, batch: Batch, conditioned: dict[int, Conditioned], writer: Writer
) -> dict[int, Finished]:
    making = _Making(kontext, batch, conditioned, writer)
    kontext.transformer_for(next(iter(making.requests.values())))
    with progress("Denoising", making.steps, unit="step") as bar:
        together = Together(kontext, conditioned, count=making.count, bar=bar, on_look=making.look)

        def denoise(number: int, item: Conditioned) -> Finished:
            latent, stem = together.latent(number), making.stem(number)
            settings = settings_of(item.framed.request, item.framed.width, item.framed.height)
            writer.save_latent(stem, latent, settings)
            return Finished(item.framed, latent, stem)

        finished = batch.each(denoise, conditioned)
    kontext.release(kontext.transformer)
    return finished


def _decode(kontext: Kontext, item: Finished, writer: Writer) -> None:
    framed = item.framed
    picture = kontext.finish(framed, item.latent)
    writer.save_picture(item.stem, picture, settings_of(framed.request, framed.width, framed.height))
    writer.save_grid(item.stem, picture, framed.request)
