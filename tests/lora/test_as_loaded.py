"""Transformers written anew in the layout of their checkpoint."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kontext.checkpoints import load_transformer, open_source
from kontext.errors import UserError
from kontext.lora.as_loaded import AsLoaded
from kontext.lora.rewrite import plan_checkpoint, write_checkpoint
from tests.tiny import TinyFiles


def test_weights_in_8_bits_become_bfloat16(tiny_files: TinyFiles, tmp_path: Path) -> None:
    """Without their scales, and equal to what the 8 bits stand for."""
    small, made = tmp_path / "fp8.safetensors", tmp_path / "made.safetensors"
    plan = plan_checkpoint(open_source(tiny_files.dit, "transformer"), {}, dtype="fp8_scaled")
    write_checkpoint(plan, small, metadata={})
    as_loaded = AsLoaded(open_source(small, "transformer"), None)
    stored = as_loaded.stored()
    as_loaded.write(made, lambda name: stored[name].load(), {"a": "b"})
    before, after = load_file(small), load_file(made)
    assert {name for name in before if "scale_weight" not in name and name != "scaled_fp8"} == set(after)
    eight = {name for name, tensor in before.items() if tensor.dtype == torch.float8_e4m3fn}
    assert eight and all(after[name].dtype == torch.bfloat16 for name in eight if name in after)
    models = [load_transformer(path, device="cpu", dtype=torch.bfloat16) for path in (small, made)]
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)


def test_a_failure_leaves_the_old_folder(tiny_files: TinyFiles, tmp_path: Path) -> None:
    as_loaded = AsLoaded(open_source(tiny_files.dit_sharded, "transformer"), torch.bfloat16)
    stored, made = as_loaded.stored(), tmp_path / "made"
    as_loaded.write(made, lambda name: stored[name].load(), {})
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    asked = []

    def value(name: str) -> torch.Tensor:
        asked.append(name)
        if len(asked) == 5:
            raise UserError("stop")
        return stored[name].load()

    with pytest.raises(UserError, match="stop"):
        as_loaded.write(made, value, {})
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before
    as_loaded.write(made, lambda name: stored[name].load() + 1, {})
    assert {path.name for path in made.iterdir()} == set(before)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
