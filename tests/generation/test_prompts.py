"""Prompt lines: values, defaults, and one clear sentence for each way of getting a line wrong."""

from pathlib import Path

import pytest

from kontext.errors import UserError
from kontext.generation.prompts import parse_line
from kontext.generation.request import Request

BASE = Request("", width=512, height=256, seed=5, guidance=3.5)


def test_a_line_without_options_keeps_the_base():
    assert parse_line("I want a cat, n or i", BASE, "x") == Request(
        "I want a cat, n or i", width=512, height=256, seed=5, guidance=3.5
    )


def test_every_option():
    line = "two cats --w 640 --h 480 --d 7 --s 9 --g 1.5 --fs 3 --l 2 --n no dogs --ci a b.png --ci c.png --m 1, 0.5"
    assert parse_line(line, BASE, "x") == Request(
        "two cats",
        references=(Path("a b.png"), Path("c.png")),
        width=640,
        height=480,
        seed=7,
        steps=9,
        guidance=1.5,
        flow_shift=3.0,
        negative_prompt="no dogs",
        true_cfg_scale=2.0,
        multipliers=(1.0, 0.5),
    )


def test_references_of_a_line_replace_those_of_the_base():
    base = Request("", references=(Path("base.png"),))
    assert parse_line("x --ci own.png", base, "x").references == (Path("own.png"),)
    assert parse_line("x", base, "x").references == (Path("base.png"),)


def test_options_alone_keep_the_prompt_of_the_base():
    assert parse_line("--w 64", Request("a cat"), "x") == Request("a cat", width=64)


def test_flow_shift_zero_means_by_resolution():
    assert parse_line("x --fs 0", Request("", flow_shift=3.0), "x").flow_shift is None


@pytest.mark.parametrize(
    "line, message",
    [
        ("x --q 3", "here: unknown option --q"),
        ("x --w", "here: --w needs a width"),
        ("x --w 3.5", "here: --w needs a width in pixels, not '3.5'"),
        ("x --s 0", "here: --s needs"),
        ("x --g nan", "here: --g needs"),
        ("x --d 1 --d 2", "here: --d is given twice"),
        ("x --ci", "here: --ci needs a path"),
        ("x --m a", "here: --m needs"),
        ("--d 1", "here: there is no prompt"),
    ],
)
def test_bad_lines(line, message):
    with pytest.raises(UserError) as caught:
        parse_line(line, BASE, "here")
    assert message in str(caught.value)
