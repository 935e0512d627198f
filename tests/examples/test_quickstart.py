"""The quick start, whole: a LoRA learns an edit that the base cannot do, and survives merging."""

import time

import pytest


@pytest.mark.slow
def test_lora_learns_the_edit_and_merging_keeps_it() -> None:
    import quickstart

    started = time.monotonic()
    errors = quickstart.main()
    assert errors["lora"] <= errors["base"] / 3
    assert errors["merged"] == pytest.approx(errors["lora"], abs=0.5)
    assert time.monotonic() - started < 240
    assert (quickstart.ROOT / quickstart.WORK / "quickstart.png").is_file()
