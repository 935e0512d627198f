"""`kontext generate` as a user runs it: files, messages and exit codes."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kontext.cli import main
from kontext.generation.outputs import save_latent


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 100, 3), dtype=np.uint8)).save(path)
    return path


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_picture_with_its_settings(generate, tmp_path):
    code, said = generate("--prompt", "a red circle", "--seed", 7)
    assert code == 0
    (name,) = files(tmp_path / "out")
    assert re.fullmatch(r"\d{8}-\d{6}-\d{3}_7\.png", name) and name in said
    with Image.open(tmp_path / "out" / name) as picture:
        assert picture.size == (64, 64) and picture.mode == "RGB"
        text = picture.text
    assert text["prompt"] == "a red circle" and text["seeds"] == "7" and text["infer_steps"] == "2"
    assert text["dit"] == "flux1-kontext-dev.safetensors" and text["software"].startswith("kontext ")


def test_the_command_line_of_musubi(tiny_files, tmp_path, photo):
    code = main(
        f"generate --dit {tiny_files.dit} --vae {tiny_files.vae} --text_encoder1 {tiny_files.t5} "
        f"--text_encoder2 {tiny_files.clip} --control_image_path {photo} --prompt red --image_size 64 80 "
        f"--infer_steps 1 --attn_mode sdpa --fp8_scaled --save_path {tmp_path / 'out'} --output_type images "
        "--seed 1234 --no_resize_control --dtype float32 --t5_max_length 16 --fp8_t5".split()
    )
    assert code == 0
    (path,) = (tmp_path / "out").iterdir()
    assert path.name.endswith("_1234.png") and Image.open(path).size == (80, 64)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(generate, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        generate("--prompt", "red", "--seed", seed, "--output-name", name, "--no-metadata")
    a, b, c = ((tmp_path / "out" / f"{name}.png").read_bytes() for name in "abc")
    assert a == b and a != c


def test_a_seed_is_drawn_and_shown(generate, tmp_path):
    _, said = generate("--prompt", "red")
    (name,) = files(tmp_path / "out")
    assert f"seed {name.rpartition('_')[2].removesuffix('.png')}" in said


def test_latents_decode_to_the_same_picture_without_the_transformer(generate, tmp_path):
    generate("--prompt", "red", "--seed", 3, "--output-type", "latent_images", "--output-name", "x")
    out = tmp_path / "out"
    assert files(out) == ["x.png", "x.safetensors"]
    assert load_file(out / "x.safetensors")["latent"].shape == (16, 8, 8)
    with safe_open(out / "x.safetensors", "pt") as file:
        names = {"seeds", "prompt", "height", "width", "infer_steps", "embedded_cfg_scale"}
        assert names <= set(file.metadata())
    gone = {"dit": None, "text_encoder1": None, "text_encoder2": None, "tokenizer1": None, "tokenizer2": None}
    code, _ = generate("--latent-path", out / "x.safetensors", "--output-name", "again", size=None, **gone)
    assert code == 0
    first, again = Image.open(out / "x.png"), Image.open(out / "again.png")
    assert np.array_equal(np.asarray(first), np.asarray(again)) and first.text == again.text


def test_several_latents_are_named_after_their_files(generate, tmp_path):
    for name, seed in (("a", "5"), ("b", "../../b")):
        save_latent(tmp_path / f"{name}.safetensors", torch.randn(1, 16, 8, 8), {"seeds": seed})
    code, _ = generate("--latent-path", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert code == 0 and {name.split("_", 1)[1] for name in files(tmp_path / "out")} == {"5_a.png", "0_b.png"}


def test_latent_only_needs_no_autoencoder(generate, tmp_path):
    code, _ = generate("--prompt", "red", "--output-type", "latent", "--output-name", "x", vae=None)
    assert code == 0 and files(tmp_path / "out") == ["x.safetensors"]


def test_the_output_follows_the_cropped_reference(generate, tmp_path, photo):
    code, said = generate(
        "--prompt", "red", "--control-image", photo, "--no-resize-control", "--output-name", "x", size=None
    )
    assert code == 0 and Image.open(tmp_path / "out" / "x.png").size == (96, 64)
    assert "photo.png: 100x70 cropped, 96x64" in said


def test_references_change_the_picture_each_by_its_own(generate, tmp_path, photo):
    other = tmp_path / "other.png"
    Image.new("RGB", (64, 64), "green").save(other)
    for name, references in (("none", ()), ("one", (photo,)), ("two", (photo, other))):
        control = ("--control-image", *references, "--no-resize-control") if references else ()
        code, _ = generate("--prompt", "red", "--seed", 1, "--output-name", name, "--no-metadata", *control)
        assert code == 0
    assert len({(tmp_path / "out" / f"{name}.png").read_bytes() for name in ("none", "one", "two")}) == 3


def test_a_size_that_is_no_multiple_of_16_is_rounded_with_a_notice(generate, tmp_path):
    code, said = generate("--prompt", "red", "--output-name", "x", size=(70, 100))
    assert code == 0 and Image.open(tmp_path / "out" / "x.png").size == (96, 64)
    assert "100x70 is rounded down to 96x64" in said


def test_a_prompt_file_goes_on_past_a_failure_and_says_so(generate, tmp_path):
    lines = "red --d 1\nblue --ci nowhere.png\n# no\ngreen --w 8\nblue --d 2 --h 80\n"
    (tmp_path / "prompts.txt").write_text(lines)
    code, said = generate("--from-file", tmp_path / "prompts.txt", "--output-name", "x")
    assert code == 2 and files(tmp_path / "out") == ["x_001.png", "x_004.png"]
    assert Image.open(tmp_path / "out" / "x_004.png").size == (64, 80)
    assert "nowhere.png: no such file" in said and "8x64 pixels" in said and "2 of 4 pictures" in said


def test_a_bad_line_is_refused_before_anything_is_loaded(generate, tmp_path):
    (tmp_path / "prompts.txt").write_text("red\nblue --q 1\n")
    code, said = generate("--from-file", tmp_path / "prompts.txt")
    assert code == 2 and "prompts.txt, line 2: unknown option --q" in said
    assert not (tmp_path / "out").exists()


def test_interactive_goes_on_after_mistakes_and_ends_with_the_input(generate, tmp_path, monkeypatch):
    lines = iter(["red --d 1", "", "x --q", "y --w 8", "red --d 1"])

    def typed(*_):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    code, said = generate("--interactive", "--output-name", "x", "--no-metadata")
    assert code == 0 and files(tmp_path / "out") == ["x.png", "x_2.png"]
    assert (tmp_path / "out" / "x.png").read_bytes() == (tmp_path / "out" / "x_2.png").read_bytes()
    assert "This line: unknown option --q" in said and "8x64 pixels" in said


def test_ctrl_c_stops_the_picture_then_the_program(generate, monkeypatch):
    lines, made = iter(["red --d 1", "red --d 2"]), []

    def typed(*_):
        try:
            return next(lines)
        except StopIteration:
            raise KeyboardInterrupt from None

    def run_batch(kontext, requests, writer):
        made.extend(request.seed for request in requests)
        if len(made) == 1:
            raise KeyboardInterrupt
        return []

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr("kontext.commands.conversing.run_batch", run_batch)
    code, said = generate("--interactive")
    assert code == 130 and made == [1, 2] and "Stopped." in said


def test_a_latent_of_another_autoencoder_is_refused(generate, tmp_path):
    save_latent(tmp_path / "a.safetensors", torch.randn(1, 4, 8, 8), {})
    code, said = generate("--latent-path", tmp_path / "a.safetensors")
    assert code == 2 and "The latent has 4 channels, but this autoencoder decodes 16" in said


def test_nan_latents_stop_the_run(generate, tmp_path, tiny_files):
    weights = load_file(tiny_files.dit)
    weights["final_layer.linear.bias"][0] = float("nan")
    save_file(weights, tmp_path / "nan.safetensors")
    code, said = generate("--prompt", "red", dit=tmp_path / "nan.safetensors")
    assert code == 2 and "Step 1: the latents became NaN" in said and not files(tmp_path / "out")


BAD = {
    "no prompt": ([], {}, "--prompt must be given to make a picture"),
    "two modes": (["--from-file", "a", "--interactive"], {}, "--from-file and --interactive cannot be used"),
    "no encoder": (["--prompt", "x"], {"text_encoder1": None}, "--text-encoder1 must be given"),
    "no autoencoder": (["--prompt", "x"], {"vae": None}, "--vae must be given"),
    "missing model": (
        ["--prompt", "x"],
        {"dit": "no.safetensors"},
        "--dit: there is no file or folder no.safetensors",
    ),
    "missing tokenizer": (["--prompt", "x"], {"tokenizer1": "no"}, "--tokenizer1: there is no folder no"),
    "missing lora": (
        ["--prompt", "x", "--lora-weight", "no"],
        {},
        "--lora-weight: there is no file or folder no",
    ),
    "kernel": (
        ["--prompt", "x", "--attn-mode", "flash3"],
        {},
        "flash_attn_interface, which is not installed",
    ),
    "small": (["--prompt", "x"], {"size": (8, 64)}, "64x8 pixels; both sides need at least 16"),
    "missing reference": (["--prompt", "x", "--control-image", "no.png"], {}, "no.png: no such file"),
    "missing latent": (["--latent-path", "no.safetensors"], {}, "no.safetensors: not a readable latent file"),
    "latents to latents": (
        ["--latent-path", "x", "--output-type", "latent"],
        {},
        "--latent-path makes pictures",
    ),
    "copies of a latent": (
        ["--latent-path", "x", "--images-per-prompt", "2"],
        {},
        "--images-per-prompt cannot be used with --latent-path",
    ),
    "strength of a latent": (
        ["--latent-path", "x", "--strength", "0.5"],
        {},
        "--strength cannot be used with --latent-path",
    ),
    "missing prompts": (["--from-file", "no.txt"], {}, "no.txt: the prompt file cannot be read"),
    "steps": (["--prompt", "x", "--infer-steps", "0"], {}, "--infer-steps"),
    "name": (["--prompt", "x", "--output-name", "a/b"], {}, "--output-name"),
    "strengths": (
        ["--prompt", "x", "--lora-weight", "a", "--lora-multiplier", "1", "2"],
        {},
        "2 multipliers",
    ),
}


@pytest.mark.parametrize("more, changes, message", BAD.values(), ids=BAD)
def test_bad_input(generate, more, changes, message):
    code, said = generate(*more, **changes)
    assert code == 2 and message in said and "Traceback" not in said


def test_wrong_models_are_named(generate, tiny_files):
    code, said = generate("--prompt", "x", dit=tiny_files.vae)
    assert code == 2 and "is an autoencoder" in said and "--dit expects" in said


def test_a_broken_reference_is_named(generate, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    code, said = generate("--prompt", "x", "--control-image", tmp_path / "bad.png")
    assert code == 2 and "bad.png" in said


def test_an_unwritable_folder_is_found_at_once(generate, tmp_path):
    (tmp_path / "file").touch()
    code, said = generate("--prompt", "x", out=tmp_path / "file")
    assert code == 2 and "output folder cannot be written" in said


SLOW_IMPORTS = """
import sys
from kontext.cli import main
code = main(sys.argv[1:])
print(code, [name for name in ("torch._dynamo", "transformers.modeling_utils", "diffusers") if name in sys.modules])
"""


def test_nothing_is_imported_that_takes_longer_than_torch(generate, tmp_path):
    """The first step comes soon after the command is given: text encoders are our own, meta models draw nothing."""
    options = [part for pair in generate.models.items() for part in map(str, pair)]
    options += ["--device", "cpu", "--dtype", "float32", "--infer-steps", "1", "--image-size", "32", "32"]
    options += ["--prompt", "x", "--save-path", str(tmp_path)]
    command = [sys.executable, "-c", SLOW_IMPORTS, "generate", *options]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.split("\n")[0] == "0 []"
