"""Pictures that differ in nothing but the seed, made in one batch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kontext.console import Progress, notice
from kontext.device import memory_used
from kontext.generation.pipeline import Kontext
from kontext.generation.request import Request
from kontext.generation.stages import ITEM_ERRORS, Conditioned

MOST = {"cuda": 8, "cpu": 4}
"""Pictures in a batch, by device. A CPU gains little, and nothing tells that its memory runs out."""

OnLook = Callable[[int, int, Tensor], None]
"""Called with the number of an item, of a step that is done, and the latent (1, C, h, w) that the step points at."""


def seedless(request: Request) -> Request:
    """What must be equal for two requests to be made in one batch."""
    return replace(request, seed=None)


class Together:
    """Latents by item number. The one that is asked for is made with those behind it that differ in seed alone.

    As many at a time as fit: half as many when memory runs out, or when a batch fails, so that a bad one fails alone.
    count: of all items, for the progress bar.
    """

    def __init__(
        self,
        kontext: Kontext,
        items: Mapping[int, Conditioned],
        *,
        count: int,
        bar: Progress,
        on_look: OnLook = lambda number, step, latent: None,
    ) -> None:
        self.kontext, self.items, self.count = kontext, items, count
        self.bar, self.on_look = bar, on_look
        self.most = MOST[kontext.runtime.device.type]
        self.ready: dict[int, Tensor] = {}

    def latent(self, number: int) -> Tensor:
        """The finished latent (1, C, h, w). Raises what making it alone raises."""
        if number not in self.ready:
            numbers = self._alike(number)
            while not (made := self._make(numbers)):
                numbers = numbers[: len(numbers) // 2]
            self.ready |= made
        return self.ready.pop(number)

    def _alike(self, first: int) -> list[int]:
        """The numbers from `first` on that can be made with it."""
        wanted = seedless(self.items[first].framed.request)
        numbers = []
        for number in sorted(n for n in self.items if n >= first):
            if len(numbers) == self.most or seedless(self.items[number].framed.request) != wanted:
                break
            numbers.append(number)
        return numbers

    def _make(self, numbers: Sequence[int]) -> dict[int, Tensor]:
        """The latents of these items; none where several at once failed."""
        done = 0

        def on_step(step: int, latents: Tensor) -> None:
            nonlocal done
            done += len(numbers)
            self.bar.advance(len(numbers), self._note(numbers))
            for number, latent in zip(numbers, latents.split(1), strict=True):
                self.on_look(number, step, latent)

        seeds = [self.items[number].framed.request.seed for number in numbers]
        try:
            latents = self.kontext.denoise(self.items[numbers[0]], on_step, seeds=seeds)
        except ITEM_ERRORS as error:
            if len(numbers) == 1:
                raise
            self.bar.advance(-done)
            if isinstance(error, torch.OutOfMemoryError):
                self.most = len(numbers) // 2
                notice(
                    f"The memory does not hold {len(numbers)} pictures at a time; going on with {self.most}."
                )
            return {}
        return dict(zip(numbers, latents.split(1), strict=True))

    def _note(self, numbers: Sequence[int]) -> str:
        memory = f"{memory_used(self.kontext.runtime.device) / 1e9:.1f} GB"
        if self.count == 1:
            return memory
        which = f"picture {numbers[0]}" if len(numbers) == 1 else f"pictures {numbers[0]} to {numbers[-1]}"
        return f"{which} of {self.count}, {memory}"
