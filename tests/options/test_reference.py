"""The tables of the README, and that README has them."""

from pathlib import Path

import pytest

from kontext.errors import UserError
from kontext.options import COMMANDS
from kontext.options.reference import between_markers, fill, markdown
from tests.options.models import Everything

README = Path(__file__).parents[2] / "README.md"


def test_a_line_per_option_and_group() -> None:
    lines = markdown(Everything).splitlines()
    assert "| **Files** | |" in lines
    assert "| `--dit path` | Transformer; required |" in lines
    assert "| `--prompt text` | Text \\[in brackets\\] \\| with a bar |" in lines
    assert (
        "| `--attn-mode sdpa\\|flash` | Kernel; default sdpa; also --sdpa for sdpa, --flash-attn for flash |"
        in lines
    )
    assert "| `--steps integer` | Steps; \\>=1, \\<=100; default 25 |" in lines
    assert "| `--shuffle/--no-shuffle` | Shuffle |" in lines
    assert "| `--vae-dtype choice` | Precision; float32, bfloat16, float16 |" in lines


def test_fill_replaces_what_is_between_the_markers_and_nothing_else() -> None:
    text = "\n".join(f"<<< <!-- options:{name} -->OLD<!-- /options:{name} --> >>>" for name in COMMANDS)
    filled = fill(text)
    assert "OLD" not in filled and filled.count("<<<") == filled.count(">>>") == len(COMMANDS)
    assert fill(filled) == filled
    assert between_markers(filled, "train") == markdown(COMMANDS["train"].model())


def test_a_document_without_markers_is_refused() -> None:
    with pytest.raises(UserError, match="options:cache-latents"):
        fill("nothing")


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_shows_the_options_as_they_are(command: str) -> None:
    table = between_markers(README.read_text(encoding="utf-8"), command)
    assert table is not None, f"README.md has no <!-- options:{command} --> ... <!-- /options:{command} -->"
    assert table == markdown(COMMANDS[command].model()), "run: python -m kontext.options.reference README.md"
