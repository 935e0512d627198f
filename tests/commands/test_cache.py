"""`kontext cache-latents` and `kontext cache-text` as a user runs them, on the small models."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from kontext.cli import main
from kontext.data.batches import open_batches
from kontext.data.cache import read_header, read_latents, read_text
from kontext.data.items import Skips
from tests.data.folders import dataset_file, pairs, picture


def latents(path: Path, files: Any, *more: str) -> int:
    words = ["--dataset_config", path, "--vae", files.vae, "--device", "cpu", *more]
    return main(["cache-latents", *map(str, words)])


def text(path: Path, files: Any, *more: str) -> int:
    words = ["--dataset-config", path, "--text_encoder1", files.t5, "--text_encoder2", files.clip]
    words += ["--device", "cpu", "--dtype", "float32", "--t5-max-length", "16", *more]
    return main(["cache-text", *map(str, words)])


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


def changed(before: dict[str, int], after: dict[str, int]) -> set[str]:
    return {name.split("_")[0] for name in after if after[name] != before.get(name)}


def test_latents_are_those_of_diffusers(tmp_path: Path, tiny_files: Any) -> None:
    from diffusers import AutoencoderKL

    path = pairs(tmp_path, "abc", size=(64, 64))
    assert latents(path, tiny_files, "--batch-size", "2", "--num-workers", "2") == 0
    vae = AutoencoderKL.from_pretrained(tiny_files.pipeline, subfolder="vae")
    back = read_latents(tmp_path / "cache" / "b_0064x0064_fk.safetensors")
    for source, found in (("img", back.target), ("ctl", back.references[0])):
        pixels = torch.tensor(list(Image.open(tmp_path / source / "b.png").tobytes())).view(1, 64, 64, 3)
        with torch.no_grad():
            mean = vae.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mode()
        expected = (mean - vae.config.shift_factor) * vae.config.scaling_factor
        assert (found - expected[0]).norm() / expected.norm() < 1e-5


def test_embeddings_are_those_of_transformers(tmp_path: Path, tiny_files: Any) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

    path = pairs(tmp_path, "abc")
    assert text(path, tiny_files) == 0
    back = read_text(tmp_path / "cache" / "b_fk_te.safetensors")
    ids = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    t5_ids = T5TokenizerFast.from_pretrained(tiny_files.t5_tokenizer)("make b red", max_length=16, **ids)
    clip_ids = CLIPTokenizer.from_pretrained(tiny_files.clip_tokenizer)("make b red", max_length=77, **ids)
    with torch.no_grad():
        txt = T5EncoderModel.from_pretrained(tiny_files.pipeline, subfolder="text_encoder_2")(
            t5_ids.input_ids
        )[0]
        clip = CLIPTextModel.from_pretrained(tiny_files.pipeline, subfolder="text_encoder")
        vector = clip(clip_ids.input_ids).pooler_output
    assert torch.allclose(back.txt, txt[0], atol=1e-5) and torch.allclose(back.vector, vector[0], atol=1e-5)


def test_only_what_changed_is_encoded_again(
    tmp_path: Path, tiny_files: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    path, cache = pairs(tmp_path, "abcd"), tmp_path / "cache"
    assert latents(path, tiny_files) == text(path, tiny_files) == 0
    first = times(cache)
    assert len(first) == 8
    assert latents(path, tiny_files) == text(path, tiny_files) == 0
    assert times(cache) == first
    assert "0 of 4 items to encode." in capfd.readouterr().err

    picture(tmp_path / "img" / "a.png", seed=50)
    picture(tmp_path / "ctl" / "b.png", seed=51)
    (tmp_path / "img" / "c.txt").write_text("remove it")
    assert latents(path, tiny_files) == 0
    second = times(cache)
    assert changed(first, second) == {"a", "b"}
    assert text(path, tiny_files) == 0
    assert changed(second, times(cache)) == {"c"}
    assert latents(path, tiny_files, "--no-skip-existing") == 0
    assert changed(second, times(cache)) == set("abcd")


def test_other_weights_tokenizers_and_settings_are_noticed(tmp_path: Path, tiny_files: Any) -> None:
    path, cache = pairs(tmp_path, "ab"), tmp_path / "cache"
    assert latents(path, tiny_files) == text(path, tiny_files) == 0
    before = times(cache)
    weights = load_file(tiny_files.vae)
    weights["encoder.conv_in.weight"][0, 0, 0, 0] += 1
    save_file(weights, tmp_path / "vae.safetensors")
    assert latents(path, tiny_files, "--vae", str(tmp_path / "vae.safetensors")) == 0
    assert {name for name, time in times(cache).items() if time != before[name]} == {
        "a_0064x0048_fk.safetensors",
        "b_0064x0048_fk.safetensors",
    }
    before = times(cache)
    assert text(path, tiny_files, "--tokenizer1", str(tiny_files.t5_tokenizer)) == 0
    assert times(cache) == before, "the same tokenizer from elsewhere"
    assert text(path, tiny_files, "--t5-max-length", "8") == 0
    assert changed(before, times(cache)) == {"a", "b"}
    assert read_text(cache / "a_fk_te.safetensors").txt.shape[0] == 8


def test_caches_are_ready_for_training(tmp_path: Path, tiny_files: Any) -> None:
    path = pairs(tmp_path, "abc", size=(64, 64))
    assert latents(path, tiny_files) == text(path, tiny_files) == 0
    batch = open_batches(path, seed=0, skips=Skips()).load(0, 0)
    assert batch.latents.shape == batch.references[0].shape == (1, 16, 8, 8)
    assert batch.txt.shape == (1, 16, 32) and batch.vector.shape == (1, 24)
    assert batch.latents.dtype == batch.txt.dtype == torch.float32


def test_files_of_removed_items_are_deleted_and_no_others(tmp_path: Path, tiny_files: Any) -> None:
    path, cache = pairs(tmp_path, "abc"), tmp_path / "cache"
    assert latents(path, tiny_files) == text(path, tiny_files) == 0
    foreign = cache / "z_0064x0048_fk.safetensors"
    save_file({"latents_1x8x8_float32": torch.zeros(16, 8, 8)}, foreign, {"architecture": "flux_kontext"})
    for folder in ("img", "ctl"):
        (tmp_path / folder / "b.png").unlink()
    (tmp_path / "img" / "a.png").write_bytes(b"")
    assert latents(path, tiny_files, "--keep-cache") == 0
    assert len(times(cache)) == 7
    assert latents(path, tiny_files) == text(path, tiny_files) == 0
    assert set(times(cache)) == {
        "a_0064x0048_fk.safetensors",  # still listed, though unreadable now
        "a_fk_te.safetensors",
        "c_0064x0048_fk.safetensors",
        "c_fk_te.safetensors",
        foreign.name,
    }


def test_two_targets_of_one_name_both_survive(tmp_path: Path, tiny_files: Any) -> None:
    picture(tmp_path / "img" / "a.png", seed=1)
    picture(tmp_path / "img" / "a.bmp", seed=2)
    (tmp_path / "img" / "a.txt").write_text("make it red")
    path = dataset_file(tmp_path)
    assert latents(path, tiny_files) == text(path, tiny_files) == 0
    one, two = (read_latents(tmp_path / "cache" / f"{key}_0064x0048_fk.safetensors") for key in ("a", "a~2"))
    assert not torch.equal(one.target, two.target)
    assert open_batches(path, seed=0, skips=Skips()).items_per_epoch == 2


def test_a_killed_run_is_taken_up(tmp_path: Path, tiny_files: Any) -> None:
    path, cache = pairs(tmp_path, "abc"), tmp_path / "cache"
    assert latents(path, tiny_files) == 0
    (cache / "b_0064x0048_fk.safetensors").unlink()
    torn = cache / "c_0064x0048_fk.safetensors"
    torn.write_bytes(torn.read_bytes()[:100])
    left = cache / ".kontext-1-00ff.tmp"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    before = times(cache)
    assert latents(path, tiny_files) == 0
    assert changed(before, times(cache)) == {"b", "c"} and not left.exists()
    assert read_header(torn) is not None


def test_unreadable_pictures_end_in_a_table(
    tmp_path: Path, tiny_files: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    path = pairs(tmp_path, "abcd")
    (tmp_path / "img" / "a.png").write_bytes(b"")
    damaged = tmp_path / "ctl" / "b.png"
    damaged.write_bytes(damaged.read_bytes()[:2000])
    (tmp_path / "img" / "c.txt").unlink()
    assert latents(path, tiny_files) == 0
    shown = capfd.readouterr().err
    for words in ("is empty (0 bytes)", "damaged or cut short", "no caption: there is no c.txt"):
        assert words in shown
    assert list(times(tmp_path / "cache")) == ["d_0064x0048_fk.safetensors"]
    assert latents(path, tiny_files, "--strict") == 2


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: (root / "data.toml").unlink(), "no such dataset file"),
        (lambda root: dataset_file(root, resoluton=3), "Did you mean resolution?"),
        (lambda root: (root / "ctl" / "a.png").unlink(), "no reference for a.png"),
        (lambda root: [p.unlink() for p in (root / "img").iterdir()], "there are no pictures in it"),
        (lambda root: (root / "cache").write_text("a file"), "Cannot write"),
    ],
)
def test_bad_datasets_exit_with_2(
    tmp_path: Path, tiny_files: Any, capfd: pytest.CaptureFixture[str], prepare: Any, message: str
) -> None:
    path = pairs(tmp_path, "ab")
    prepare(tmp_path)
    assert latents(path, tiny_files) == 2
    assert message in capfd.readouterr().err


def test_bad_models_exit_with_2(tmp_path: Path, tiny_files: Any, capfd: pytest.CaptureFixture[str]) -> None:
    path = pairs(tmp_path, "ab")
    assert main(["cache-latents", "--dataset-config", str(path)]) == 2
    assert "--vae must be given" in capfd.readouterr().err
    assert latents(path, tiny_files, "--vae", str(tiny_files.dit)) == 2
    assert text(path, tiny_files, "--text-encoder1", str(tiny_files.vae)) == 2
    weights = load_file(tiny_files.vae)
    weights["encoder.conv_out.bias"][:] = float("nan")
    save_file(weights, tmp_path / "nan.safetensors")
    capfd.readouterr()
    assert latents(path, tiny_files, "--vae", str(tmp_path / "nan.safetensors")) == 2
    assert "img/a.png: its latents contain NaN" in capfd.readouterr().err
    assert not list(tmp_path.glob("cache/*"))


def test_looking_needs_no_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, sheet = pairs(tmp_path, "abc", size=(300, 200)), tmp_path / "sheet.png"
    words = ["cache-latents", "--dataset-config", str(path), "--debug-mode"]
    assert main([*words, "console", "--console_num_images", "2"]) == 0
    shown = capfd.readouterr().out
    assert "2 of 3 items" in shown and "make b red" in shown and "make c red" not in shown
    assert "300x200" in shown and "80x48" in shown
    assert main([*words, "image", "--debug-output", str(sheet)]) == 0
    assert Image.open(sheet).format == "PNG" and not (tmp_path / "cache").exists()
