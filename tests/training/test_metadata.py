import hashlib
from pathlib import Path

import safetensors.torch
import torch

from kontext.data.config import Dataset
from kontext.training.metadata import (
    Facts,
    Title,
    at_save,
    describe_datasets,
    hashes,
    network_fields,
    spec_fields,
)

FACTS = Facts(
    items=4, batches=2, epochs=3, steps=6, datasets=[], resolution=(768, 512), optimizer="o", network_args={}, session=1
)  # fmt: skip


def test_hashes_are_those_of_the_file_with_training_fields_alone(tmp_path: Path) -> None:
    """Rule of sd-scripts: sha256 of what follows the header; first 8 hex digits over 64 KiB from byte 1 MiB."""
    tensors = {"a": torch.randn(700, 400), "b": torch.arange(9.0)}
    found = hashes(tensors, {"ss_x": "1", "modelspec.title": "t"})
    safetensors.torch.save_file(tensors, tmp_path / "f", metadata={"ss_x": "1"})
    data = (tmp_path / "f").read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    assert found["sshs_model_hash"] == hashlib.sha256(data[begin:]).hexdigest()
    assert found["sshs_legacy_hash"] == hashlib.sha256(data[2**20 : 2**20 + 2**16]).hexdigest()[:8]


def test_spec_fields() -> None:
    fields = spec_fields(Title("cat", author="me", timestep_range=(0, 500)), FACTS)
    assert fields == {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "flux-1-dev/lora",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux",
        "modelspec.title": "cat",
        "modelspec.resolution": "768x512",
        "modelspec.author": "me",
        "modelspec.timestep_range": "0,500",
    }
    assert (
        spec_fields(Title("cat", resolution="1x2", architecture="x"), FACTS)["modelspec.resolution"] == "1x2"
    )


def test_times_are_written_only_when_recorded() -> None:
    assert at_save(FACTS, step=2, epoch=1, now=5.0) == {"ss_steps": "2", "ss_epoch": "1"}
    timed = Facts(**{**FACTS.__dict__, "started": 1.0})
    fields = at_save(timed, step=2, epoch=1, now=1e9)
    assert fields["ss_training_finished_at"] == "1000000000.0"
    assert fields["modelspec.date"].startswith("2001-09-0")


def test_few_fields_without_metadata() -> None:
    names = ("base_model_version", "network_module", "network_dim", "network_alpha", "network_args")
    fields = {f"ss_{name}": "x" for name in (*names, "seed", "steps")}
    assert set(network_fields(fields)) == {f"ss_{name}" for name in names}


def test_datasets_are_described_without_full_paths(tmp_path: Path) -> None:
    plain = Dataset(image_directory=tmp_path / "deep" / "pictures", resolution=(64, 32), batch_size=3)
    edits = Dataset(image_jsonl_file=tmp_path / "x.jsonl", cache_directory=tmp_path / "cache", num_repeats=2)
    first, second = describe_datasets([plain, edits], {tmp_path / "cache"})
    assert first == {
        "resolution": [64, 32], "caption_extension": ".txt", "batch_size_per_device": 3, "num_repeats": 1,
        "enable_bucket": False, "bucket_no_upscale": False, "image_directory": "pictures", "has_control": False,
    }  # fmt: skip
    assert (second["image_jsonl_file"], second["num_repeats"], second["has_control"]) == ("x.jsonl", 2, True)
