"""`kontext generate`: formats, grids, several pictures of a prompt, and pictures repeated from their settings."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from kontext.commands.recalling import READ, recall, run_settings
from kontext.generation.formats import read_settings, save_picture
from kontext.generation.outputs import Writer
from kontext.generation.parts import Loras
from kontext.options.generate import Generate


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_picture_is_repeated_from_its_settings(generate, tmp_path, photo):
    options = (
        "--prompt", "red", "--seed", 5, "--control-image", photo, "--no-resize-control", "--sampler", "heun",
        "--embedded-cfg-scale", 3.5, "--flow-shift", 2, "--negative-prompt", "blue", "--true-cfg-scale", 2,
        "--schedule", "simple", "--strength", 0.7, "--restore-size",
    )  # fmt: skip
    assert generate(*options, "--output-name", "first", size=(32, 48))[0] == 0
    first = tmp_path / "out" / "first.png"
    code, said = generate("--from-image", first, "--output-name", "again", size=None)
    assert code == 0 and "Settings from" in said
    assert (tmp_path / "out" / "again.png").read_bytes() == first.read_bytes()
    code, _ = generate("--from-image", first, "--seed", 6, "--output-name", "other", size=None)
    other = tmp_path / "out" / "other.png"
    assert code == 0 and read_settings(other) == read_settings(first) | {"seeds": "6"}
    assert not np.array_equal(Image.open(other), Image.open(first))


def test_masks_loras_and_several_references_are_repeated(generate, tmp_path, photo):
    mask, stem = tmp_path / "mask.png", "lora_unet_{}_blocks_0_{}"
    Image.fromarray(np.uint8(255) * (np.arange(80)[None].repeat(48, 0) < 40)).save(mask)
    lora = {
        f"{stem.format(*place)}.lora_{part}.weight": torch.full(shape, 0.25)
        for place in (("double", "img_attn_proj"), ("double", "txt_attn_proj"), ("single", "linear2"))
        for part, shape in (("down", (1, 320 if place[0] == "single" else 64)), ("up", (64, 1)))
    }
    save_file(lora, tmp_path / "a.safetensors")
    given = ("--lora-weight", tmp_path / "a.safetensors")
    (tmp_path / "p.txt").write_text("red --strength 0.8 --m 1.5:single=0.5,double1-3=2\n")
    options = (
        "--from-file", tmp_path / "p.txt", "--control-image", photo, photo, "--no-resize-control", "--sampler", "dpmpp_2m",
        "--schedule", "beta", "--noise-layout", "packed", "--control-placement", "index", "--mask", mask, "--mask-blur", 2,
        "--include-patterns", r"double_blocks\..*", r"single_blocks\..*", "--exclude-patterns", ".*txt_attn.*", "--int8",
        "--split-attn", "--seed", 3, *given,
    )  # fmt: skip
    assert generate(*options, "--output-name", "first", size=(48, 80))[0] == 0
    first, again = (tmp_path / "out" / f"{name}.png" for name in ("first", "again"))
    code, said = generate("--from-image", first, *given, "--output-name", "again", size=None)
    assert code == 0 and again.read_bytes() == first.read_bytes(), said
    code, _ = generate(
        "--from-image", first, *given, "--exclude-patterns", "x", "--output-name", "o", size=None
    )
    assert code == 0 and not np.array_equal(Image.open(tmp_path / "out" / "o.png"), Image.open(first))


def test_every_option_is_repeated_or_changes_no_picture():
    """A new option must say which it is: name it in `recalling`, or here."""
    models = {"dit", "vae", "text_encoder1", "text_encoder2", "tokenizer1", "tokenizer2", "lora_weight"}
    unchanging = {
        "device", "blocks_to_swap", "modulation", "lycoris", "save_merged_model", "save_path", "output_name",
        "output_type", "output_format", "grid", "preview", "no_metadata", "from_file", "from_image",
        "images_per_prompt", "interactive", "latent_path", "config_file", "print_config", "debug", "dry_run",
        "vram_budget",  # what it chooses is noted
    }  # fmt: skip
    assert READ.keys() | {"seed", "image_size"} | models | unchanging == Generate.model_fields.keys()


def test_the_form_of_the_weights_may_be_another(tmp_path, tiny_files):
    """It is noted with the picture, and gives way as a whole to the one that is asked for."""
    assert run_settings(Generate(int8=True, int8_fast=True), Loras()) == {"int8": "true", "int8_fast": "true"}
    settings = {"prompt": "x", "seeds": "1", "width": "64", "height": "64", "fp8": "true", "fp8_fast": "true"}
    save_picture(tmp_path / "a.png", Image.new("RGB", (64, 64)), settings)
    again = recall(Generate(), tmp_path / "a.png")
    assert (again.fp8, again.fp8_fast, again.nf4) == (True, True, False)
    other = recall(Generate(nf4=True), tmp_path / "a.png")
    assert (other.fp8, other.fp8_fast, other.nf4) == (False, False, True)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sampler": "magic"}, "its setting for --sampler, 'magic', is not valid"),
        ({"seeds": "-1"}, "its setting for --seed, '-1', is not valid"),
        ({"height": "tall"}, "its setting for --image-size"),
        ({"fp8": "true", "nf4": "true"}, "--fp8 and --nf4 exclude each other"),
        (
            {"lora_weight": "style.safetensors"},
            "was made with the LoRA style.safetensors; give it with --lora-weight",
        ),
    ],
)
def test_tampered_settings(generate, tmp_path, changes, message):
    settings = {"prompt": "x", "seeds": "1", "width": "64", "height": "64"} | changes
    save_picture(tmp_path / "odd.png", Image.new("RGB", (64, 64)), settings)
    code, said = generate("--from-image", tmp_path / "odd.png", size=None)
    assert code == 2 and "odd.png" in said and message in said and "Traceback" not in said


def test_seeds_count_up(generate, tmp_path):
    options = ("--prompt", "red", "--infer-steps", 1, "--output-format", "jpg")
    code, _ = generate(*options, "--seed", 8, "--images-per-prompt", 2)
    names = files(tmp_path / "out")
    assert code == 0 and [name.rpartition("_")[2] for name in names] == ["8.jpg", "9.jpg"]
    generate(*options, "--seed", 9, "--output-name", "alone")
    second, alone = (Image.open(tmp_path / "out" / name) for name in (names[1], "alone.jpg"))
    assert second.format == "JPEG"
    assert np.abs(np.int16(second) - np.int16(alone)).max() <= 2  # a batch rounds its sums in another order


def test_a_reference_is_encoded_once_for_all_copies(generate, tmp_path, photo):
    options = ("--prompt", "red", "--control-image", photo, "--images-per-prompt", 3, "--infer-steps", 1)
    photo_at_another_size = Image.open(photo).resize((85, 50))
    photo_at_another_size.save(photo)
    code, said = generate(*options, "--no-resize-control")
    assert code == 0 and said.count("85x50 cropped, 80x48") == 1 and len(files(tmp_path / "out")) == 3


def test_a_grid_shows_reference_and_result(generate, tmp_path, photo):
    options = ("--prompt", "red", "--control-image", photo, "--no-resize-control", "--output-name", "x")
    code, _ = generate(*options, "--grid", size=(96, 64))
    out = tmp_path / "out"
    assert code == 0 and files(out) == ["x.png", "x_grid.png"]
    expected = Image.new("RGB", (160 + 64, 96))
    expected.paste(Image.open(photo).resize((160, 96), Image.Resampling.LANCZOS), (0, 0))
    expected.paste(Image.open(out / "x.png"), (160, 0))
    assert np.array_equal(Image.open(out / "x_grid.png"), expected)


def test_an_item_without_a_reference_has_no_grid_and_says_so(generate, tmp_path, photo):
    (tmp_path / "p.txt").write_text(f"red --ci {photo}\nred\n")
    options = ("--no-resize-control", "--output-name", "x", "--grid", "--infer-steps", 1)
    code, said = generate("--from-file", tmp_path / "p.txt", *options)
    assert code == 0 and files(tmp_path / "out") == ["x_001.png", "x_001_grid.png", "x_002.png"]
    assert "x_002: has no reference, so there is no grid of it." in said


def test_a_grid_needs_a_reference(generate):
    code, said = generate("--prompt", "x", "--grid")
    assert code == 2 and "--grid needs a reference" in said


def test_looks_while_a_picture_is_made(generate, tmp_path, monkeypatch):
    seen = []
    save = Writer.save_look

    def saved(self, stem, look):
        save(self, stem, look)
        with Image.open(self.folder / f"{stem}_preview.png") as written:
            seen.append((stem, written.size, np.array(written).std() > 0))

    monkeypatch.setattr(Writer, "save_look", saved)
    options = ("--prompt", "red", "--seed", 1, "--infer-steps", 5, "--preview", 2)
    code, _ = generate(*options, "--output-name", "x", "--images-per-prompt", 2)
    assert code == 0 and seen == [(f"x_00{n}", (64, 64), True) for _ in range(2) for n in (1, 2)]
    assert files(tmp_path / "out") == ["x_001.png", "x_002.png"]
    latent_only = tmp_path / "latent"
    code, _ = generate(*options, "--output-name", "y", "--output-type", "latent", out=latent_only)
    assert code == 0 and files(latent_only) == ["y.safetensors", "y_preview.png"]
    code, said = generate(*options, "--output-type", "latent", vae=None)
    assert code == 2 and "--vae must be given" in said
