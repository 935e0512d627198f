from dataclasses import replace
from math import sqrt

import pytest

from kontext.data.buckets import SizeRules, bucket_list, control_size, nearest_bucket, own_bucket, target_size
from kontext.errors import UserError

PLAIN = SizeRules(
    resolution=(128, 128),
    enable_bucket=True,
    no_upscale=False,
    no_resize_control=False,
    control_resolution=None,
)


def test_buckets_of_128_by_hand() -> None:
    # area 16384; widths 64, 80, 96, 112, 128 (144 is not below 128 + 16); heights 256, 204, 170, 146, 128
    upright = [(64, 256), (80, 192), (96, 160), (112, 144), (128, 128)]
    assert bucket_list((128, 128)) == tuple(sorted({*upright, *((h, w) for w, h in upright)}))


@pytest.mark.parametrize(
    "resolution", [(1024, 1024), (960, 544), (768, 512), (100, 70), (333, 1000), (16, 16), (20, 20)]
)
def test_buckets_against_the_formula(resolution: tuple[int, int]) -> None:
    area = resolution[0] * resolution[1]
    side = int(sqrt(area))
    start = side // 2 - side // 2 % 16
    expected = set()
    for width in range(start, side + 16, 16):
        height = area // width // 16 * 16 if width else 0
        if height:
            expected |= {(width, height), (height, width)}
    assert bucket_list(resolution) == tuple(sorted(expected))
    assert all(w % 16 == h % 16 == 0 and 0 < w * h <= area for w, h in expected)


def test_nearest_ratio_wins_and_the_first_of_equals() -> None:
    buckets = bucket_list((128, 128))
    assert nearest_bucket((300, 200), buckets) == (160, 96)  # 1.5: 160/96 = 1.667, 144/112 = 1.286
    assert nearest_bucket((200, 300), buckets) == (96, 160)  # 0.667: 0.6, 0.778
    assert nearest_bucket((5000, 100), buckets) == (256, 64)
    assert nearest_bucket((150, 100), ((16, 16), (32, 16))) == (16, 16)


def test_one_bucket_is_the_resolution_in_whole_tokens() -> None:
    rules = replace(PLAIN, enable_bucket=False, resolution=(100, 70))
    assert target_size((3000, 20), rules) == (96, 64)


def test_no_upscale_keeps_small_pictures() -> None:
    rules = replace(PLAIN, no_upscale=True)
    assert target_size((100, 70), rules) == (96, 64)
    assert target_size((128, 128), rules) == (128, 128)
    assert target_size((129, 128), rules) == (128, 128)  # larger: nearest bucket
    assert target_size((400, 30), rules) == (400, 16)
    assert target_size((300, 200), rules) == (160, 96)
    with pytest.raises(UserError, match="15x20 pixels is too small"):
        target_size((15, 20), rules)


def test_own_bucket_by_hand() -> None:
    # area 16384, ratio 1.5: sqrt(24576) = 156.8 -> 144; widths 112 ... 176 with heights 144, 128, 112, 96, 80
    assert own_bucket((300, 200), (128, 128)) == (160, 96)
    # ratio 1: sqrt = 128; widths 96 ... 160
    assert own_bucket((77, 77), (128, 128)) == (128, 128)
    with pytest.raises(UserError, match="too narrow"):
        own_bucket((5000, 1), (64, 64))


@pytest.mark.parametrize(
    ("no_resize", "limit", "size", "expected"),
    [
        (False, None, (300, 200), (64, 256)),
        (False, (128, 128), (300, 200), (160, 96)),
        (False, (128, 128), (30, 20), (160, 96)),
        (True, None, (300, 200), (288, 192)),
        (True, (128, 128), (300, 200), (160, 96)),
        (True, (128, 128), (100, 70), (96, 64)),  # smaller than the limit: still whole tokens
        (True, (100, 70), (100, 70), (96, 64)),
    ],
)
def test_reference_sizes(
    no_resize: bool, limit: tuple[int, int] | None, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    rules = replace(PLAIN, no_resize_control=no_resize, control_resolution=limit)
    assert control_size(size, (64, 256), rules) == expected
