import json
from pathlib import Path

import pytest

from kontext.errors import UserError
from kontext.generation.request import Request
from kontext.training.prompts import read_sample_prompts

BASE = Request("", seed=9, steps=20, guidance=2.5)


def read(folder: Path, name: str, text: str) -> list[Request]:
    (folder / name).write_text(text, encoding="utf-8")
    return read_sample_prompts(folder / name, BASE)


def test_text_lines(tmp_path: Path) -> None:
    reference = tmp_path / "my picture.png"
    reference.touch()
    first, second = read(
        tmp_path,
        "p.txt",
        f"# a remark\n\nmake it red --w 512 --h 256 --d 3 --s 8 --g 3.5 --fs 2 --ci {reference}\nplain\n",
    )
    assert first == Request(
        "make it red",
        references=(reference,),
        width=512,
        height=256,
        seed=3,
        steps=8,
        guidance=3.5,
        flow_shift=2.0,
    )
    assert second == Request("plain", seed=9, steps=20, guidance=2.5)


def test_words_of_the_prompt_are_no_options(tmp_path: Path) -> None:
    """`I want ...` and `n ...` set an image or a negative prompt elsewhere."""
    prompts = read(tmp_path, "p.txt", "I want a cat\nn dots, w 3 s 4\n")
    assert [p.prompt for p in prompts] == ["I want a cat", "n dots, w 3 s 4"]
    assert all(p.references == () and p.negative_prompt is None and p.steps == 20 for p in prompts)


def test_options_of_other_models_are_left_out_aloud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (prompt,) = read(tmp_path, "p.txt", "a cat --f 1 --s 5")
    assert prompt.steps == 5
    assert "f 1" in capsys.readouterr().err


def test_a_shift_of_zero_is_the_schedule_of_flux(tmp_path: Path) -> None:
    assert read(tmp_path, "p.txt", "a cat --fs 0")[0].flow_shift is None
    assert read(tmp_path, "p.json", '[{"prompt": "a", "discrete_flow_shift": 0}]')[0].flow_shift is None


def test_toml_shares_keys(tmp_path: Path) -> None:
    reference = tmp_path / "a.png"
    reference.touch()
    text = (
        "[prompt]\nwidth = 640\nsample_steps = 4\n[[prompt.subset]]\nprompt = 'one'\nseed = 5\n"
        f"[[prompt.subset]]\nprompt = 'two'\ncontrol_image_path = '{reference}'\n"
    )
    one, two = read(tmp_path, "p.toml", text)
    assert (one.prompt, one.width, one.steps, one.seed) == ("one", 640, 4, 5)
    assert (two.prompt, two.width, two.seed, two.references) == ("two", 640, 9, (reference,))


def test_every_setting_of_a_line_may_stand_in_a_table(tmp_path: Path) -> None:
    text = (
        "[[prompt.subset]]\nprompt = 'a'\nguidance_scale = 3\ncfg_scale = 2.0\nnegative_prompt = 'b'\n"
        "discrete_flow_shift = 1.5\nsampler = 'heun'\nstitch = true\nframe_count = 1\n"
    )
    (entry,) = read(tmp_path, "p.toml", text)
    (line,) = read(tmp_path, "p.txt", "a --g 3 --l 2 --n b --fs 1.5 --sampler heun --stitch")
    assert entry == line and (entry.guidance, entry.true_cfg_scale, entry.flow_shift) == (3.0, 2.0, 1.5)


def test_json_holds_strings_and_objects(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    entries = [
        "one --w 64",
        {"prompt": "two", "control_image_path": [str(tmp_path / "a.png"), str(tmp_path / "b.png")]},
    ]
    one, two = read(tmp_path, "p.json", json.dumps(entries))
    assert (one.prompt, one.width) == ("one", 64)
    assert two.references == (tmp_path / "a.png", tmp_path / "b.png")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.csv", "a", "must end in .txt, .toml or .json"),
        ("p.txt", "# nothing\n", "no prompt in this file"),
        ("p.txt", "a --zz 3", "unknown option"),
        ("p.txt", "a --ci missing.png", "missing.png does not exist"),
        (
            "p.toml",
            "[prompt]\nwidth = 1\n[[prompt.subset]]\nprompt = 'a'\nwidth = 2\n",
            r"width is given in \[prompt\]",
        ),
        ("p.toml", "prompts = 1", "expected a table"),
        ("p.toml", "[prompt.subset]\nprompt = 'a'", "expected a table"),
        ("p.toml", "x", "not valid TOML"),
        ("p.json", "{}", "expected a list"),
        ("p.json", '[{"prompt": "a", "colour": 1}]', "entry 1: unknown setting colour"),
        (
            "p.json",
            '[{"prompt": "a", "width": "wide"}]',
            "entry 1: width needs a width in pixels, not 'wide'",
        ),
        ("p.json", '[{"width": 64}]', "entry 1: prompt must be a text that is not empty"),
        ("p.json", '[{"prompt": "a", "sample_steps": 0}]', "entry 1: sample_steps needs a number of steps"),
        (
            "p.toml",
            "[[prompt.subset]]\nprompt = 'a'\ndiscrete_flow_shift = -1",
            "subset 1: discrete_flow_shift needs",
        ),
        (
            "p.json",
            '[{"prompt": "a", "control_image_path": [null]}]',
            "entry 1: control_image_path cannot be null",
        ),
    ],
)
def test_faults_are_named(tmp_path: Path, name: str, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read(tmp_path, name, text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere.txt: cannot be read"):
        read_sample_prompts(tmp_path / "nowhere.txt", BASE)
