"""`kontext generate` with one and several references: sizes, placement, restoring."""

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file


@pytest.fixture
def photos(tmp_path):
    paths = []
    for seed, size in enumerate([(70, 100), (48, 64)]):
        paths.append(tmp_path / f"{seed}.png")
        pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(paths[-1])
    return paths


def test_restored_to_the_references_own_size(generate, tmp_path, photos):
    options = ("--prompt", "x", "--seed", 1, "--control-image", photos[0], "--no-resize-control")
    code, said = generate(*options, "--restore-size", "--output-name", "own", size=None)
    assert code == 0 and "96x64 to 100x70, the reference's own size" in said
    with Image.open(tmp_path / "out" / "own.png") as picture:
        assert picture.size == (100, 70) and picture.text["restore_size"] == "true"


def test_placements_and_stitching_give_other_pictures(generate, tmp_path, photos):
    options = (
        "--prompt",
        "x",
        "--seed",
        1,
        "--no-resize-control",
        "--output-type",
        "latent",
        "--infer-steps",
        1,
    )
    both, latents = ("--control-image", *photos), {}
    for name, more in {
        "offset": both,
        "index": (*both, "--control-placement", "index"),
        "stitch": (*both, "--stitch"),
        "one": ("--control-image", photos[0]),
    }.items():
        code, said = generate(*options, *more, "--output-name", name)
        assert code == 0 and ("2 references stitched to 193x70" in said) == (name == "stitch")
        latents[name] = load_file(tmp_path / "out" / f"{name}.safetensors")["latent"]
    names = list(latents)
    for n, a in enumerate(names):
        for b in names[:n]:
            assert (latents[a] - latents[b]).abs().max() > 1e-4, (a, b)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--prompt", "x", "--restore-size"], "--restore-size needs a reference"),
        (
            ["--prompt", "x", "--restore-size", "--output-type", "latent"],
            "--restore-size and --grid work on pictures",
        ),
        (["--prompt", "x", "--no-resize-control", "--control-resize", "crop"], "exclude each other"),
    ],
)
def test_contradictions(generate, more, message):
    code, said = generate(*more)
    assert code == 2 and message in said
