"""Files of prompts: lines, JSONL and TOML mean the same, and each mistake is named by its place."""

from pathlib import Path

import pytest

from kontext.errors import UserError
from kontext.generation.prompt_files import read_prompt_file
from kontext.generation.request import Request
from kontext.generation.words import LETTERS, WORDS
from kontext.lora.strength import Strength
from kontext.options.generate import Generate

BASE = Request("", width=512, height=256, seed=5, guidance=3.5)

LINES = """two cats --w 640 --h 480 --d 7 --s 9 --g 1.5 --fs 3 --l 2 --n no --ci a b.png --ci c.png --m 1, 0.5 --sampler heun --stitch
red
"""
JSONL = """{"prompt": "two cats", "width": 640, "height": 480, "seed": 7, "infer_steps": 9, "embedded_cfg_scale": 1.5, "flow_shift": 3, "true_cfg_scale": 2, "negative_prompt": "no", "control_image": ["a b.png", "c.png"], "lora_multiplier": [1, 0.5], "sampler": "heun", "stitch": true}

{"prompt": "red"}
"""
TOML = """[[pictures]]
prompt = "two cats"
w = 640
h = 480
seed = 7
infer-steps = 9
embedded_cfg_scale = 1.5
fs = 3.0
true_cfg_scale = 2
negative_prompt = "no"
control_image = ["a b.png", "c.png"]
m = [1, "0.5"]
sampler = "heun"
stitch = true
[[pictures]]
prompt = "red"
"""


@pytest.mark.parametrize("ending, content", [("txt", LINES), ("jsonl", JSONL), ("toml", TOML)])
def test_three_ways_to_say_the_same(tmp_path, ending, content):
    file = tmp_path / f"prompts.{ending}"
    file.write_text(content)
    first, second = read_prompt_file(file, BASE)
    assert second == Request("red", width=512, height=256, seed=5, guidance=3.5)
    assert first == Request(
        "two cats", references=(Path("a b.png"), Path("c.png")), width=640, height=480, seed=7, steps=9, guidance=1.5,
        flow_shift=3.0, negative_prompt="no", true_cfg_scale=2.0, multipliers=(Strength(1.0), Strength(0.5)),
        sampler="heun", stitch=True,
    )  # fmt: skip


def test_names_are_those_of_options():
    names = {letter: name for name, letter in LETTERS.items()}
    assert {
        "image_size" if key in "wh" else names.get(key, key) for key in WORDS
    } <= Generate.model_fields.keys()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": "y", "wide": 3}', "a.jsonl, line 2: unknown setting wide"),
        ("a.jsonl", '{"prompt": "x"', "a.jsonl, line 1: is not JSON"),
        ("a.jsonl", "[1]", "line 1: must be a table"),
        ("a.jsonl", '{"width": 3}', "prompt must be a text"),
        ("a.jsonl", '{"prompt": "x", "width": "big"}', "line 1: width needs a width in pixels, not 'big'"),
        ("a.jsonl", '{"prompt": "x", "width": true}', "width cannot be true"),
        ("a.jsonl", '{"prompt": "x", "width": 3, "w": 4}', "w is given twice"),
        ("a.toml", "pictures = 3", "must consist of [[pictures]]"),
        ("a.toml", "seed = 3\n[[pictures]]\nprompt='x'", "must consist of [[pictures]]"),
        ("a.toml", "[[pictures]", "a.toml: is not TOML"),
        ("a.toml", "[[pictures]]\nprompt='x'\nseed=-1", "a.toml, picture 1: seed needs a seed"),
        ("a.jsonl", "", "holds no prompt"),
    ],
)
def test_bad_tables(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as caught:
        read_prompt_file(tmp_path / name, BASE)
    assert message in str(caught.value)


def test_a_file_is_read_line_by_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("# comment\n\n  a cat --d 1\nein Hündchen\n", encoding="utf-8")
    assert [(r.prompt, r.seed) for r in read_prompt_file(file, BASE)] == [("a cat", 1), ("ein Hündchen", 5)]


def test_a_bad_line_is_named_by_file_and_number(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("fine\n# no\nwrong --z\n")
    with pytest.raises(UserError, match=r"prompts\.txt, line 3: unknown option --z"):
        read_prompt_file(file, BASE)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot be read"),
        (b"", "holds no prompt"),
        (b"# x\n\n", "holds no"),
        (b"\xff\xfe\x00", "UTF-8"),
    ],
)
def test_bad_files(tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompt_file(file, BASE)
