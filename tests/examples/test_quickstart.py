"""The quick start, whole: a LoRA learns an edit that the base cannot do, and survives merging."""

import time

import pytest


@pytest.mark.slow
def test_lora_learns_the_edit_and_merging_keeps_it() -> None:
    import quickstart

    started = time.monotonic()
    errors = quickstart.main()
    base, lora, merged, blank = (errors[name] for name in ("base", "lora", "merged", "blank paper"))
    assert lora.picture <= base.picture / 3
    assert lora.line <= 0.75 * min(base.line, blank.line)
    assert merged.picture == pytest.approx(lora.picture, abs=0.5)
    assert merged.line == pytest.approx(lora.line, abs=0.5)
    assert time.monotonic() - started < 240
    assert (quickstart.ROOT / quickstart.WORK / "quickstart.png").is_file()
