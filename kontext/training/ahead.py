"""Noise levels known ahead: the modulation of a window of passes is computed at once.

For when its weights wait on the host. What is computed does not depend on where a window begins, how long it is, or
what else is in it.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kontext.denoiser import condition
from kontext.memory.modulation import has_host_modulation
from kontext.model.transformer import Modulations, Transformer
from kontext.training.feed import Example

WINDOW = 32
"""Items of a window. FLUX's modulation of an item is 2 MB in bfloat16, its batch up to 7 MB of host memory."""


@dataclass(frozen=True)
class Pass:
    """What the transformer is asked: an example at noise levels t (B,), float32, on the CPU.

    modulations: those of t, if they were computed ahead.
    """

    example: Example
    t: Tensor
    modulations: Modulations | None = None


def prepared(
    passes: Iterable[Pass], transformer: Transformer, guidance: float, device: torch.device
) -> Iterator[Pass]:
    """The same passes, their examples on `device`, with their modulations if these are computed ahead."""
    ahead = _ahead(passes, transformer, guidance) if has_host_modulation(transformer) else passes
    for each in ahead:
        yield replace(each, example=each.example.to(device))


def _ahead(passes: Iterable[Pass], transformer: Transformer, guidance: float) -> Iterator[Pass]:
    """Passes with modulations, a window's at once. One is taken for each that is given: loading stays in step."""
    passes = iter(passes)
    waiting: deque[Pass] = deque()
    while True:
        _take(passes, waiting, WINDOW - sum(len(each.t) for each in waiting))
        if not waiting:
            return
        if waiting[0].modulations is None:
            waiting = deque(_window(waiting, transformer, guidance))
        yield waiting.popleft()


def _take(passes: Iterator[Pass], waiting: deque[Pass], items: int) -> None:
    """Moves passes with as many items over, at least, while there are any."""
    while items > 0 and (following := next(passes, None)) is not None:
        waiting.append(following)
        items -= len(following.t)


@torch.no_grad()
def _window(passes: Iterable[Pass], transformer: Transformer, guidance: float) -> list[Pass]:
    passes = list(passes)
    vecs = [condition(transformer, each.example.batch.vector, guidance, each.t) for each in passes]
    mods = transformer.modulations(vecs)
    return [replace(each, modulations=mod) for each, mod in zip(passes, mods, strict=True)]
