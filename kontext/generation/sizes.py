"""The size of the output, in pixels, as (width, height)."""

from kontext.data.images import Size, floor_multiple
from kontext.errors import UserError

DEFAULT_SIZE: Size = (1024, 1024)
SMALLEST = 16  # one token


def output_size(width: int | None, height: int | None, reference: Size | None) -> Size:
    """What was asked for, else the encoded reference's size, else 1024 x 1024; rounded down to multiples of 16.

    A single given side takes the other from the reference or the default. Raises UserError for a side that is
    shorter than 16 pixels, which is one token.
    """
    other = reference or DEFAULT_SIZE
    size = (width or other[0], height or other[1])
    if min(size) < SMALLEST:
        raise UserError(
            f"The output would be {size[0]}x{size[1]} pixels; both sides need at least {SMALLEST}."
        )
    return floor_multiple(size[0]), floor_multiple(size[1])
