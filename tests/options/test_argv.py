"""The spellings of the command line."""

import shlex

import pytest

from kontext.errors import UserError
from kontext.options.argv import canonical
from tests.options.models import Everything


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("--lora_weight a b", "--lora-weight=a --lora-weight=b"),
        ("--lora-weight a --lora-weight=b", "--lora-weight=a --lora-weight=b"),
        ("--lora_multiplier -1 0.5 --dit x", "--lora-multiplier=-1 --lora-multiplier=0.5 --dit=x"),
        ("--image-size 64 32", "--image-size=64 --image-size=32"),
        ("--ae x", "--vae=x"),
        ("--sdpa", "--attn-mode=sdpa"),
        ("--flash_attn --fp8_base", "--attn-mode=flash --fp8"),
        ("--no-shuffle --no_fp8 --resize", "--no-shuffle --no-fp8 --resize"),
        ("--prompt 'a cat' --steps=3", "'--prompt=a cat' --steps=3"),
        ("--prompt=--x=y", "--prompt=--x=y"),
        ("--prompt snake_case-text", "--prompt=snake_case-text"),
        ("", ""),
    ],
)
def test_spelling(written: str, expected: str) -> None:
    assert canonical(shlex.split(written), Everything) == shlex.split(expected)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("--lora_wieght a", "There is no option --lora_wieght. Did you mean --lora-weight?"),
        ("--zzzzzz", "There is no option --zzzzzz. --help lists them all."),
        ("--prompt", "--prompt needs a value: text."),
        ("--prompt --dit x", "--prompt needs a value: text."),
        ("--lora_weight --dit x", "--lora_weight needs a value: a list, each a path."),
        ("--fp8=yes", "--fp8 takes no value; leave out '=yes'."),
        ("--prompt a cat", "Unexpected argument 'cat' after --prompt. Put quotes around a value that"),
        ("--fp8 true", "Unexpected argument 'true' after --fp8."),
        ("cat", "Unexpected argument 'cat'. Put quotes"),
    ],
)
def test_faults(written: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        canonical(shlex.split(written), Everything)
    assert str(caught.value).startswith(message)
