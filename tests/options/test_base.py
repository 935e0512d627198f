"""Declaring options."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from kontext.errors import UserError
from kontext.options.base import need, optional
from kontext.options.spec import specs
from tests.options.models import Everything, Files


def test_options_are_frozen_and_closed() -> None:
    options = Files(dit=Path("a"))
    with pytest.raises(ValidationError):
        options.dit = Path("b")
    with pytest.raises(ValidationError):
        Files(dit=Path("a"), dti=Path("b"))


def test_not_a_number_is_refused() -> None:
    with pytest.raises(ValidationError):
        Everything(dit=Path("a"), vae=Path("b"), rate=float("nan"))


def test_a_command_may_tighten_or_loosen_an_option_and_keeps_its_words() -> None:
    class Loose(Files):
        """Loose"""

        dit: Path | None = optional(Files, "dit")

    tight = {spec.name: spec for spec in specs(Everything)}["vae"]
    assert tight.required and tight.description == "Autoencoder." and tight.aliases == ("ae",)
    assert Loose().dit is None
    assert not specs(Loose)[1].required


def test_need_names_every_missing_option_and_the_reason() -> None:
    options = Everything(dit=Path("a"), vae=Path("b"))
    need(options, "dit", because="always")
    with pytest.raises(UserError, match="^--prompt and --image-size must be given to draw.$"):
        need(options, "prompt", "vae", "image_size", because="to draw")
