"""What is written can be read by anybody: PIL for the pictures, safetensors for the latents."""

import re
from datetime import datetime
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, safe_open, save_file

from kontext.errors import UserError
from kontext.generation import outputs
from kontext.generation.formats import save_picture
from kontext.generation.request import Request
from kontext.processes import Processes

REQUEST = Request("a cät", references=(Path("in.png"),), seed=7, steps=3, flow_shift=2.0)


def test_a_picture_carries_its_settings(tmp_path):
    settings = outputs.settings_of(REQUEST, 64, 96)
    save_picture(tmp_path / "a.png", Image.new("RGB", (4, 2), (1, 2, 3)), settings)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.text == settings and picture.getpixel((3, 1)) == (1, 2, 3)
    assert settings == {
        "seeds": "7",
        "prompt": "a cät",
        "height": "96",
        "width": "64",
        "infer_steps": "3",
        "embedded_cfg_scale": "2.5",
        "flow_shift": "2.0",
        "control_image": "in.png",
        "no_resize_control": "false",
    }


def test_settings_name_the_negative_prompt_only_when_it_counts():
    assert "negative_prompt" not in outputs.settings_of(Request("x", negative_prompt="y"), 64, 64)
    counted = outputs.settings_of(Request("x", negative_prompt="y", true_cfg_scale=2.0), 64, 64)
    assert (counted["negative_prompt"], counted["true_cfg_scale"]) == ("y", "2.0")


def test_a_latent_file_has_the_shape_and_names_of_musubi(tmp_path):
    latent = torch.randn(1, 16, 4, 6)
    outputs.save_latent(tmp_path / "a.safetensors", latent, {"seeds": "7"})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["latent"], latent[0])
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"seeds": "7"}
    read = outputs.read_latent(tmp_path / "a.safetensors")
    assert torch.equal(read.latent, latent) and read.settings == {"seeds": "7"}


@pytest.mark.parametrize("shape", [(16, 4, 6), (1, 16, 4, 6), (1, 16, 1, 4, 6)])
def test_latents_of_other_shapes_are_read(tmp_path, shape):
    latent = torch.randn(shape, dtype=torch.bfloat16)
    save_file({"latent": latent}, tmp_path / "a.safetensors")
    read = outputs.read_latent(tmp_path / "a.safetensors").latent
    assert read.dtype == torch.float32 and torch.equal(read, latent.float().reshape(1, 16, 4, 6))


@pytest.mark.parametrize(
    "tensors, message",
    [
        (None, "not a readable latent file"),
        (b"\x80\x04pickle", "not a readable latent file"),
        ({"weight": torch.zeros(2)}, "no tensor named 'latent'; it holds weight"),
        ({"latent": torch.zeros(3, 4)}, r"shape \(3, 4\)"),
        ({"latent": torch.full((16, 4, 4), float("nan"))}, "NaN"),
    ],
)
def test_bad_latent_files(tmp_path, tensors, message):
    path = tmp_path / "a.safetensors"
    if isinstance(tensors, bytes):
        path.write_bytes(tensors)
    elif tensors is not None:
        save_file(tensors, path)
    with pytest.raises(UserError, match=message) as caught:
        outputs.read_latent(path)
    assert "a.safetensors" in str(caught.value)


def test_stems(tmp_path):
    writer = outputs.Writer(tmp_path)
    stem = writer.stem(1, 1, 7)
    assert re.fullmatch(r"\d{8}-\d{6}-\d{3}_7", stem)
    assert re.fullmatch(r"\d{8}-\d{6}-\d{3}_7_in", writer.stem(1, 1, 7, "in"))
    named = outputs.Writer(tmp_path, name="fix")
    assert named.stem(1, 1, 7) == "fix"
    assert [named.stem(n, 2, 7) for n in (1, 2)] == ["fix_001", "fix_002"]


def test_stems_of_one_moment_differ_and_overwrite_nothing(tmp_path, monkeypatch):
    class Now:
        @staticmethod
        def now():
            return datetime(2026, 1, 2, 3, 4, 5, 678901)

    monkeypatch.setattr(outputs, "datetime", Now)
    (tmp_path / "20260102-030405-678_7.safetensors").touch()
    writer = outputs.Writer(tmp_path)
    stems = [writer.stem(n, 2, 7) for n in (1, 2)]
    assert stems == ["20260102-030405-678_7_2", "20260102-030405-678_7_3"]


def test_stems_of_two_processes_never_meet(tmp_path, monkeypatch):
    """Whatever the moment and the seed; the names look as those of one process."""
    for size in (2, 3, 8, 300):
        ranks = range(0, size, max(1, size // 8))
        names = [
            {writer._moment(moment) for moment in range(1000)}
            for writer in (outputs.Writer(tmp_path, crew=Processes(rank, size)) for rank in ranks)
        ]
        assert all(0 <= moment < 1000 for moments in names for moment in moments)
        assert sum(map(len, names)) == len(set().union(*names))
    assert [outputs.Writer(tmp_path)._moment(moment) for moment in range(1000)] == list(range(1000))


@pytest.mark.parametrize("pictures, latents", [(True, False), (False, True), (True, True)])
def test_the_writer_saves_what_is_wanted(tmp_path, pictures, latents):
    writer = outputs.Writer(tmp_path, pictures=pictures, latents=latents, common={"dit": "x"})
    writer.save_latent("a", torch.zeros(1, 16, 4, 4), {"seeds": "7"})
    writer.save_picture("a", Image.new("RGB", (4, 4)), {"seeds": "7"})
    expected = ["a.png"] * pictures + ["a.safetensors"] * latents
    assert sorted(path.name for path in tmp_path.iterdir()) == expected
    if latents:
        assert outputs.read_latent(tmp_path / "a.safetensors").settings == {"seeds": "7", "dit": "x"}


def test_no_metadata_leaves_nothing(tmp_path):
    writer = outputs.Writer(tmp_path, latents=True, metadata=False, common={"dit": "x"})
    writer.save_latent("a", torch.zeros(1, 16, 4, 4), {"seeds": "7"})
    writer.save_picture("a", Image.new("RGB", (4, 4)), {"seeds": "7"})
    assert outputs.read_latent(tmp_path / "a.safetensors").settings == {}
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.text == {}


def test_the_output_folder_is_made_or_refused(tmp_path):
    outputs.Writer(tmp_path / "a" / "b").prepare()
    assert (tmp_path / "a" / "b").is_dir() and not any((tmp_path / "a" / "b").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: the output folder cannot be written"):
        outputs.Writer(tmp_path / "file").prepare()
