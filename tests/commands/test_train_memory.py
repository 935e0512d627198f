"""Training with weights on the host writes the LoRA that it writes without."""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import equal

from kontext.cli import main
from tests.training.dataset import Cached

BASE = ["--seed", "42", "--network-dim", "4", "--learning-rate", "1e-3", "--max-data-loader-n-workers", "0"]
SHORT = ["--max-train-steps", "2", "--no-report"]


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--gradient-checkpointing"],
        ["--fp8-scaled", "--checkpointing", "selective"],
        ["--nf4"],
        ["--fp8-fast"],
    ],
)
def test_streamed_blocks_change_no_digit(cached: Cached, tmp_path: Path, more: list[str]) -> None:
    written = []
    for swap in ("0", "max"):
        options = [
            "--output-dir",
            str(tmp_path / swap),
            "--output-name",
            "edit",
            "--blocks-to-swap",
            swap,
            *more,
        ]
        assert main(["train", *cached.models, *BASE, *SHORT, *options]) == 0
        written.append(load_file(tmp_path / swap / "edit.safetensors"))
    resident, streamed = written
    assert any(tensor.abs().max() > 0 for name, tensor in resident.items() if "up" in name)
    assert all(equal(resident[name], streamed[name]) for name in resident)
