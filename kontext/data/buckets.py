"""Which size a picture is brought to: buckets of about one area, whole tokens on each side.

Sizes are (width, height) in pixels. The rules are musubi-tuner's, so that one dataset file gives the same sizes in
both programs.
"""

from dataclasses import dataclass
from functools import cache
from math import isqrt, sqrt

from kontext.data.images import Size, floor_multiple
from kontext.errors import UserError
from kontext.model.latents import PIXELS_PER_TOKEN as STEP


@dataclass(frozen=True)
class SizeRules:
    """How one dataset block sizes its pictures.

    resolution: the one size, or with `enable_bucket` the area of all buckets.
    no_upscale: pictures of less than that area keep their own size, in whole tokens.
    no_resize_control, control_resolution: see `control_size`.
    """

    resolution: Size
    enable_bucket: bool
    no_upscale: bool
    no_resize_control: bool
    control_resolution: Size | None


@cache
def bucket_list(resolution: Size) -> tuple[Size, ...]:
    """All sizes in steps of 16 that have at most the area of `resolution`, from half its side on, ascending.

    With area A and side s = floor(sqrt(A)): every width w = m, m + 16, ... < s + 16 where m is s // 2 in whole
    steps, with the largest height of at most A / w; and the same turned round.
    """
    area = resolution[0] * resolution[1]
    side = isqrt(area)
    sizes = set()
    for width in range(max(floor_multiple(side // 2), STEP), side + STEP, STEP):
        height = floor_multiple(area // width)
        if height:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


def nearest_bucket(size: Size, buckets: tuple[Size, ...]) -> Size:
    """The bucket whose aspect ratio is nearest; the first one of several."""
    ratio = size[0] / size[1]
    return min(buckets, key=lambda bucket: abs(bucket[0] / bucket[1] - ratio))


def target_size(size: Size, rules: SizeRules) -> Size:
    """The size that a target picture of `size` is brought to."""
    if not rules.enable_bucket:
        return whole_tokens(rules.resolution)
    if rules.no_upscale and size[0] * size[1] <= rules.resolution[0] * rules.resolution[1]:
        return whole_tokens(size)
    return nearest_bucket(size, bucket_list(rules.resolution))


def control_size(size: Size, target: Size, rules: SizeRules) -> Size:
    """The size that a reference of `size` is brought to, next to a target of size `target`.

    ==================  ====================  ==================================================
    no_resize_control   control_resolution    the reference gets
    ==================  ====================  ==================================================
    false               -                     the target's size
    false               given                 its own bucket of that area
    true                -                     its own size in whole tokens
    true                given                 its own bucket when larger than that area, else its
                                              own size in whole tokens
    ==================  ====================  ==================================================
    """
    limit = rules.control_resolution
    if limit is None:
        return whole_tokens(size) if rules.no_resize_control else target
    if rules.no_resize_control and size[0] * size[1] <= limit[0] * limit[1]:
        return whole_tokens(size)
    return own_bucket(size, limit)


def own_bucket(size: Size, resolution: Size) -> Size:
    """The size of about the area of `resolution` that keeps the aspect ratio of `size` best.

    Five widths in steps of 16 around sqrt(area * ratio) are tried, each with the largest height that fits the area.
    """
    area, ratio = resolution[0] * resolution[1], size[0] / size[1]
    middle = floor_multiple(int(sqrt(area * ratio)))
    widths = (w for w in range(middle - 2 * STEP, middle + 3 * STEP, STEP) if w > 0)
    sizes = [(w, floor_multiple(area // w)) for w in widths if area // w >= STEP]
    if not sizes:
        raise UserError(
            f"A picture of {size[0]}x{size[1]} pixels is too narrow for control_resolution "
            f"{resolution[0]}x{resolution[1]}: its shorter side would have less than {STEP} pixels."
        )
    return min(sizes, key=lambda each: abs(each[0] / each[1] - ratio))


def whole_tokens(size: Size) -> Size:
    """Both sides rounded down to multiples of 16. Raises UserError when nothing is left of one."""
    if min(size) < STEP:
        raise UserError(
            f"A picture of {size[0]}x{size[1]} pixels is too small: each side needs {STEP} or more."
        )
    return floor_multiple(size[0]), floor_multiple(size[1])
