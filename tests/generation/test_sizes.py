"""The output's size, by hand."""

import pytest

from kontext.errors import UserError
from kontext.generation.sizes import output_size


@pytest.mark.parametrize(
    "width, height, reference, expected",
    [
        (None, None, None, (1024, 1024)),
        (None, None, (1248, 832), (1248, 832)),
        (640, 480, (1248, 832), (640, 480)),
        (640, None, (1248, 832), (640, 832)),
        (1023, 79, None, (1008, 64)),
        (64, 64, None, (64, 64)),
    ],
)
def test_the_request_wins_then_the_reference_then_the_default(width, height, reference, expected):
    assert output_size(width, height, reference) == expected


@pytest.mark.parametrize("size", [(15, 1024), (1024, 8)])
def test_small_sizes_are_refused(size):
    with pytest.raises(UserError, match="at least 16"):
        output_size(*size, None)


def test_a_small_reference_is_refused_as_an_output_size():
    with pytest.raises(UserError, match="8x64"):
        output_size(None, None, (8, 64))
