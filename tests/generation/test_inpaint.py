"""Masks and strength: what stays is exactly what was there, and the rest is diffusers' inpainting pipeline."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from kontext.errors import UserError
from kontext.flow import mix, schedule
from kontext.generation.inpaint import Canvas, latent_area, open_mask
from kontext.generation.parts import ModelFiles, Runtime
from kontext.generation.pipeline import Kontext
from kontext.generation.references import Opened
from kontext.generation.request import Request
from kontext.model.latents import draw_noise
from kontext.sampler import SAMPLERS


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def white_box(size, box):
    mask = Image.new("RGB", size)
    mask.paste((255, 255, 255), box)
    return mask


@pytest.fixture(scope="module")
def kontext(tiny_files):
    files = ModelFiles(
        tiny_files.dit, tiny_files.vae, tiny_files.t5, tiny_files.clip,
        tiny_files.t5_tokenizer, tiny_files.clip_tokenizer,
    )  # fmt: skip
    return Kontext(files, Runtime(torch.device("cpu"), torch.float32, t5_max_length=32, keep=True))


def request(**changes):
    given = {"seed": 3, "steps": 4, "resize_references": False, "mask": white_box((64, 48), (16, 8, 40, 32))}
    return Request("make it red", (picture(64, 48),), **given | changes)


@pytest.mark.parametrize("strength, masked", [(1.0, True), (0.6, False), (0.6, True)])
def test_latents_are_those_of_diffusers(kontext, tiny_files, strength, masked):
    from diffusers import FluxKontextInpaintPipeline

    theirs = FluxKontextInpaintPipeline.from_pretrained(tiny_files.pipeline, dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    asked = request(strength=strength)
    if not masked:
        asked = replace(asked, mask=None)
    everywhere = Image.new("RGB", (64, 48), "white")
    tokens = theirs(
        image=asked.references[0], mask_image=asked.mask or everywhere, prompt=asked.prompt, strength=strength,
        height=48, width=64, max_area=48 * 64, num_inference_steps=4, guidance_scale=2.5, max_sequence_length=32,
        generator=torch.Generator().manual_seed(3), output_type="latent", _auto_resize=False,
    ).images  # fmt: skip
    expected = theirs._unpack_latents(tokens, 48, 64, theirs.vae_scale_factor)
    found = kontext.denoise(kontext.condition(kontext.frame(asked)))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_outside_the_mask_each_step_is_the_noised_reference(kontext, sampler):
    framed = kontext.frame(request(sampler=sampler))
    noise, sigmas = draw_noise(3, 48, 64), schedule(4, 12)
    velocity = framed.canvas.within(lambda x, t: torch.sin(9 * x), noise)
    outside = (framed.canvas.area == 0).expand_as(noise)
    assert 0 < outside.float().mean() < 1

    def check(step, x):
        expected = mix(framed.canvas.latent, noise, sigmas[step + 1 : step + 2])
        torch.testing.assert_close(x[outside], expected[outside], atol=2e-5, rtol=1e-5)

    SAMPLERS[sampler](velocity, noise, sigmas, on_step=check)


@pytest.mark.parametrize("restore", [False, True])
def test_pixels_outside_are_the_references_own(kontext, restore):
    """71x50: encoded at 64x48 from the top left, or restored to 71x50; both keep the reference's very pixels."""
    photo, box = picture(71, 50), (16, 8, 40, 32)
    asked = replace(request(mask=white_box((71, 50), box)), references=(photo,), restore_size=restore)
    result = np.array(kontext.picture(asked))
    original = np.array(photo)[: len(result), : result.shape[1]]
    assert result.shape == ((50, 71, 3) if restore else (48, 64, 3))
    inside = np.zeros(result.shape[:2], bool)
    inside[8:32, 16:40] = True
    assert np.array_equal(result[~inside], original[~inside])
    assert (result[inside] != original[inside]).mean() > 0.9


def test_a_blurred_edge_is_a_passage(kontext):
    reference = Opened("a.png", picture(64, 48))
    hard, soft = (np.array(open_mask(request(mask_blur=blur), reference)) for blur in (0, 3))
    assert set(np.unique(hard)) == {0, 255} and len(np.unique(soft)) > 10
    assert soft[20, 28] > 250 and soft[0, 63] == 0 and 90 < soft[20, 16] < 165


def test_a_latent_cell_opens_for_one_pixel():
    mask = Image.new("L", (64, 48))
    mask.putpixel((17, 9), 255)
    area = latent_area(mask, (64, 48), request())
    assert area.shape == (1, 1, 6, 8) and area.nonzero().tolist() == [[0, 0, 1, 2]]


def test_the_mask_goes_the_way_of_its_reference():
    """Cropping 200x100 to 1456x720 cuts 4 of 728 rows above: white above row 50 ends at row 360 of the crop."""
    asked = Request("x", crop_references=True)
    mask = Image.new("L", (200, 100))
    mask.paste(255, (0, 0, 200, 50))
    area = latent_area(mask, (1456, 720), asked)[0, 0]
    assert area[:45].min() == 1 and area[46:].max() == 0


def test_start_is_the_reference_noised_to_the_first_level():
    canvas = Canvas(torch.ones(1, 1, 2, 2), None)
    assert torch.allclose(canvas.start(torch.zeros(1, 1, 2, 2), torch.tensor([0.25])), torch.tensor(0.75))


@pytest.mark.parametrize(
    "steps, strength, skipped", [(25, 1, 0), (25, 0.6, 10), (4, 0.6, 1), (3, 0.01, 2), (1, 0.5, 0)]
)
def test_strength_leaves_out_steps(steps, strength, skipped):
    assert Request("x", steps=steps, strength=strength).skipped_steps == skipped


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"references": ()}, "--mask needs a reference"),
        ({"references": (), "mask": None, "strength": 0.5}, "--strength needs a reference"),
        ({"references": (picture(64, 48),) * 2, "stitch": True}, "cannot be used with --stitch"),
        (
            {"mask": white_box((60, 48), (0, 0, 8, 8))},
            "The mask: has 60x48 pixels, but The reference has 64x48",
        ),
        ({"mask": Image.new("RGB", (64, 48))}, "is black, so nothing would change"),
    ],
)
def test_bad_masks(kontext, changes, message):
    with pytest.raises(UserError, match=message):
        kontext.frame(replace(request(), **changes))
