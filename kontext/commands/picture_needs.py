"""How large the pictures are that requests ask for."""

from collections.abc import Sequence

from kontext.data.images import Size
from kontext.generation.references import open_references, prepare
from kontext.generation.request import Request
from kontext.generation.sizes import output_size
from kontext.memory.estimate import Work
from kontext.memory.needs import Pictures
from kontext.model.latents import PIXELS_PER_TOKEN


def picture_sizes(request: Request) -> tuple[Size, ...]:
    """Of the output and of each reference as it is encoded.

    Raises UserError for a reference that cannot be read, and for an output that is too small.
    """
    references = [prepare(opened, request).size for opened in open_references(request)]
    output = output_size(request.width, request.height, references[0] if references else None)
    return output, *references


def largest(requests: Sequence[Request], *, text: int, itemsize: int) -> Pictures:
    """What the largest of them takes. text: tokens of a prompt; itemsize: bytes of a number of the transformer's."""
    sizes = [picture_sizes(request) for request in requests]
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
