"""Prompt lines: values, defaults, and one clear sentence for each way of getting a line wrong."""

from dataclasses import fields
from pathlib import Path

import pytest

from kontext.errors import UserError
from kontext.generation.prompts import parse_line
from kontext.generation.request import Request
from kontext.generation.words import WORDS
from kontext.lora.strength import Rule, Strength

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
        multipliers=(Strength(1.0), Strength(0.5)),
    )


def test_what_has_no_letter_goes_by_its_name():
    line = (
        "two cats --sampler heun --schedule beta --noise-layout packed --mask m.png --mask_blur 4 --strength 0.6 "
        "--control-resize crop --no-resize-control --control-placement index --stitch --restore-size true --Seed 3 "
        "--lora-multiplier 0.5 1.0:double=0.5,single3-10=0"
    )
    rules = (Rule("double", 0, None, 0.5), Rule("single", 3, 10, 0.0))
    assert parse_line(line, Request(""), "x") == Request(
        "two cats", sampler="heun", schedule="beta", noise_layout="packed", mask=Path("m.png"), mask_blur=4.0,
        strength=0.6, crop_references=True, resize_references=False, placement="index", stitch=True,
        restore_size=True, seed=3, multipliers=(Strength(0.5), Strength(1.0, rules)),
    )  # fmt: skip
    base = Request("", stitch=True, resize_references=False)
    assert parse_line("x --stitch false --no-resize-control false", base, "x") == Request("x")


def test_every_field_of_a_request_can_be_set():
    assert {word.field for word in WORDS.values()} == {f.name for f in fields(Request)} - {"prompt"}


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
        ("x --m 1:treble=2", "here: --m needs one strength per LoRA, such as 0.8 or 1.0:double=0.5"),
        ("x --sampler magic", "here: --sampler needs euler, heun or dpmpp_2m, not 'magic'"),
        ("x --strength 0", "here: --strength needs a number over 0, at most 1, not '0'"),
        ("x --mask", "here: --mask needs a path"),
        ("x --stitch yes", "here: --stitch needs no value, true or false, not 'yes'"),
        ("x --d 1 --seed 2", "here: --seed is given twice"),
        ("x --infer-step 2", "here: unknown option --infer-step; a prompt line knows --w --h"),
        ("--d 1", "here: there is no prompt"),
    ],
)
def test_bad_lines(line, message):
    with pytest.raises(UserError) as caught:
        parse_line(line, BASE, "here")
    assert message in str(caught.value)
