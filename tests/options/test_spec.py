"""What fields mean to the command line."""

import pytest

from kontext.options import COMMANDS
from kontext.options.base import Options, option
from kontext.options.spec import names, nearest, specs
from tests.options.models import Everything

SPECS = {spec.name: spec for spec in specs(Everything)}


def test_own_options_come_first_and_redeclared_ones_stay_in_their_group() -> None:
    panels = list(dict.fromkeys(spec.panel for spec in specs(Everything)))
    assert panels == ["Main options", "Files", "General"]
    assert SPECS["vae"].panel == "Files"
    assert [spec.name for spec in specs(Everything)][:2] == ["prompt", "image_size"]


@pytest.mark.parametrize(
    ("name", "kind", "metavar", "noun"),
    [
        ("prompt", "value", "text", "text"),
        ("image_size", "list", "integer integer", "2 values, each a whole number"),
        ("lora_weight", "list", "path ...", "a list, each a path"),
        ("attn_mode", "value", "sdpa|flash", "one of sdpa, flash"),
        ("vae_dtype", "value", "float32|bfloat16|float16", "one of float32, bfloat16, float16"),
        ("warmup", "value", "integer|number", "a whole number or a number"),
        ("steps", "value", "integer", "a whole number"),
        ("shuffle", "switch", "true|false", "true or false"),
    ],
)
def test_types(name: str, kind: str, metavar: str, noun: str) -> None:
    spec = SPECS[name]
    assert (spec.kind, spec.metavar, spec.noun) == (kind, metavar, noun)


def test_bounds() -> None:
    assert SPECS["steps"].bounds == ">=1, <=100"
    assert SPECS["rate"].bounds == ">0"


def test_every_name_of_an_option() -> None:
    known = names(Everything)
    assert known["fp8_base"].spec.name == "fp8" and known["fp8_base"].value is True
    assert known["no_shuffle"].value is False
    assert known["resize"].spec.name == "no_resize" and known["resize"].value is False
    assert known["flash_attn"].value == "flash" and known["flash_attn"].spec.name == "attn_mode"
    assert known["ae"].spec.name == "vae" and known["ae"].value is None


def test_two_options_of_one_name_are_a_defect() -> None:
    class Clash(Options):
        """Clash"""

        first: str = option("One.", aliases=("second",))
        second: str = option("Two.")

    with pytest.raises(AssertionError, match="second"):
        names(Clash)


def test_nearest() -> None:
    assert nearest("netwrk_dim", ["network_dim", "network_alpha"]) == "network_dim"
    assert nearest("zzz", ["network_dim"]) is None


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_of_the_program_are_well_formed(command: str) -> None:
    model = COMMANDS[command].model()
    assert names(model).keys() >= {"device", "dtype", "seed", "config_file", "print_config", "debug"}
    for spec in specs(model):
        assert spec.description.endswith("."), f"{spec.flag}: a description is a sentence"
