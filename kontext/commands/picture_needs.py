"""How large the pictures are that requests ask for."""

from collections.abc import Sequence

from kontext.data.images import Size
from kontext.generation.inpaint import check_canvas, open_mask
from kontext.generation.references import open_references, prepare
from kontext.generation.request import Request
from kontext.generation.sizes import output_size
from kontext.generation.together import seedless
from kontext.memory.estimate import Work
from kontext.memory.needs import Pictures
from kontext.model.latents import PIXELS_PER_TOKEN

Sizes = tuple[Size, ...]
"""Of a picture's output and of each reference as it is encoded."""


def picture_sizes(requests: Sequence[Request]) -> list[Sizes]:
    """Of each request. References and masks are opened once for all that differ in nothing but the seed.

    Raises UserError for one that cannot be read, and for an output that is too small.
    """
    known: dict[Request, Sizes] = {}
    for request in map(seedless, requests):
        if request not in known:
            known[request] = _sizes(request)
    return [known[seedless(request)] for request in requests]


def _sizes(request: Request) -> Sizes:
    check_canvas(request)
    opened = open_references(request)
    if opened:
        open_mask(request, opened[0])
    references = [prepare(each, request).size for each in opened]
    return output_size(request.width, request.height, references[0] if references else None), *references


def largest(requests: Sequence[Request], sizes: Sequence[Sizes], *, text: int, itemsize: int) -> Pictures:
    """What the largest of them takes. text: tokens of a prompt; itemsize: bytes of a number of the transformer's."""
    return Pictures(
        work=Work(1, text + max(sum(map(_tokens, each)) for each in sizes), itemsize),
        steps=max(request.steps for request in requests),
        pixels=max(_pixels(output) for output, *_ in sizes),
        reference=max((_pixels(reference) for _, *each in sizes for reference in each), default=0),
        passes=2 if any(request.uses_negative for request in requests) else 1,
    )


def _tokens(size: Size) -> int:
    return (size[0] // PIXELS_PER_TOKEN) * (size[1] // PIXELS_PER_TOKEN)


def _pixels(size: Size) -> int:
    return size[0] * size[1]
