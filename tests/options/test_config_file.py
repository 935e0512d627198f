"""Options from and to TOML."""

import tomllib
from pathlib import Path

import pytest

from kontext.errors import UserError
from kontext.options.config_file import read, render, toml_value
from kontext.options.resolve import resolve
from tests.options.models import Everything


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return tmp_path / "x.toml"


def test_sections_are_for_reading_and_both_spellings_and_aliases_work(toml: Path) -> None:
    toml.write_text(
        'ae = "v"\n[model]\ndit = "d"\nfp8_base = true\nflash-attn = true\n'
        '[model.lora]\nlora_weight = "one"\nlora-multiplier = [0.5, 2]\nno_shuffle = true\nresize = false\n'
    )
    values = {name: value for name, (_, value) in read(toml, Everything).items()}
    assert values == {
        "vae": "v",
        "dit": "d",
        "fp8": True,
        "attn_mode": "flash",
        "lora_weight": ["one"],
        "lora_multiplier": [0.5, 2],
        "shuffle": False,
        "no_resize": True,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stesp = 3", "there is no option 'stesp'. Did you mean 'steps'?"),
        ("[a]\nlora-wieght = 3", "there is no option 'lora-wieght'. Did you mean 'lora-weight'?"),
        ("print-config = true", "there is no option 'print-config'."),
        ("config_file = 'y'", "there is no option 'config_file'."),
        ('vae = "a"\nae = "b"', "'vae' and 'ae' are the same option. Keep one of them."),
        ('fp8 = "yes"', "fp8: must be true or false, not 'yes'."),
        ("sdpa = false", "sdpa = false says nothing. Set attn-mode instead."),
        ("a = = 1", "is not valid TOML: "),
    ],
)
def test_faults_name_the_file_and_the_key(toml: Path, text: str, message: str) -> None:
    toml.write_text(text)
    with pytest.raises(UserError) as caught:
        read(toml, Everything)
    assert str(caught.value).startswith(str(toml)) and message in str(caught.value)


def test_files_that_cannot_be_read(toml: Path) -> None:
    with pytest.raises(UserError, match=r"Cannot read the config file .*x.toml: No such file"):
        read(toml, Everything)
    with pytest.raises(UserError, match="Is a directory"):
        read(toml.parent, Everything)
    toml.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file in UTF-8"):
        read(toml, Everything)


def test_what_is_printed_reads_back_equal(toml: Path) -> None:
    awkward = 'a "quoted" \\ back\nslash \x7f \t 猫 [x]'
    given = {
        "dit": "d/é",
        "vae": "v",
        "prompt": awkward,
        "image_size": ["64", "32"],
        "lora_weight": ["a", "b"],
        "lora_multiplier": ["-1", "1e-7"],
        "rate": "3e-5",
        "warmup": "0.1",
        "shuffle": False,
        "vae_dtype": "bf16",
        "seed": "0",
    }
    options = resolve(Everything, given)
    toml.write_text(render(options), encoding="utf-8")
    assert resolve(Everything, {"config_file": str(toml)}) == options.model_copy(update={"config_file": toml})


def test_only_options_with_a_value_are_printed() -> None:
    printed = render(Everything(dit=Path("d"), vae=Path("v")))
    assert "prompt" not in printed and "config" not in printed and "debug" not in printed
    assert printed.startswith("# Main options\nlora-weight = []\n")
    assert tomllib.loads(printed)["rate"] == 1e-4


@pytest.mark.parametrize("value", [True, 0, -3, 1e-5, 1e22, "", 'q"\\', "\x7f\x00", [1.0, 2.0], ["a"], []])
def test_values_survive_toml(value: object) -> None:
    back = tomllib.loads(f"x = {toml_value(value)}")["x"]
    assert back == value and type(back) is type(value)
