"""Pictures of several seeds in one batch: each is what its seed gives alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from kontext.console import progress
from kontext.errors import UserError
from kontext.generation.denoising import _Watch
from kontext.generation.parts import ModelFiles, Runtime
from kontext.generation.pipeline import Kontext
from kontext.generation.request import Request
from kontext.generation.together import MOST, Together

REFERENCE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
MASK = Image.fromarray(np.uint8(255) * (np.arange(64)[None].repeat(48, 0) < 32))
BASE = Request(
    "red", (REFERENCE,), width=64, height=48, steps=3, guidance=3.0, resize_references=False, seed=5
)


@pytest.fixture(scope="module")
def kontext(tiny_files):
    files = ModelFiles(
        tiny_files.dit, tiny_files.vae, tiny_files.t5, tiny_files.clip,
        tiny_files.t5_tokenizer, tiny_files.clip_tokenizer,
    )  # fmt: skip
    return Kontext(files, Runtime(torch.device("cpu"), torch.float32, t5_max_length=16, keep=True))


def conditioned(kontext, requests):
    return {n: kontext.condition(kontext.frame(request)) for n, request in enumerate(requests, 1)}


def all_latents(kontext, items, **more):
    with progress("Denoising", 3 * len(items)) as bar:
        together = Together(kontext, items, count=len(items), bar=bar, **more)
        return {number: together.latent(number) for number in items}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"negative_prompt": "blue", "true_cfg_scale": 2.0, "sampler": "heun"},
        {"mask": MASK, "strength": 0.7, "sampler": "dpmpp_2m"},
        {"references": (), "schedule": "beta"},
    ],
)
def test_each_picture_is_what_its_seed_gives_alone(kontext, changes):
    items = conditioned(kontext, replace(BASE, **changes).copies(3))
    batch = kontext.denoise(items[1], seeds=(5, 6, 7))
    assert batch.shape == (3, 16, 6, 8)
    for number, latent in enumerate(batch.split(1), 1):
        torch.testing.assert_close(latent, kontext.denoise(items[number]), rtol=1e-5, atol=1e-5)
    assert (batch[0] - batch[1]).abs().max() > 0.1


def test_those_in_a_row_that_differ_in_seed_alone_share_a_pass(kontext, monkeypatch):
    requests = [*BASE.copies(3), replace(BASE, guidance=2.0), replace(BASE, guidance=2.0, seed=9)]
    items, seeds, looks = conditioned(kontext, requests), [], []
    denoise = kontext.denoise
    monkeypatch.setattr(kontext, "denoise", lambda *a, **k: seeds.append(k["seeds"]) or denoise(*a, **k))
    latents = all_latents(kontext, items, on_look=lambda *look: looks.append(look))
    assert seeds == [[5, 6, 7], [5, 9]]
    assert [(number, step) for number, step, _ in looks[:6]] == [(n, s) for s in (0, 1) for n in (1, 2, 3)]
    for number, step, latent in looks:
        if step == 2:  # the last step points at the result
            torch.testing.assert_close(latent, latents[number])
    seeds.clear()
    monkeypatch.setitem(MOST, "cpu", 2)
    all_latents(kontext, items)
    assert seeds == [[5, 6], [7], [5, 9]]


def test_half_as_many_when_memory_runs_out(kontext, monkeypatch, capsys):
    items, sizes = conditioned(kontext, BASE.copies(4)), []
    denoise = kontext.denoise

    def short_of_memory(item, on_step, *, seeds):
        sizes.append(len(seeds))
        if len(seeds) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return denoise(item, on_step, seeds=seeds)

    monkeypatch.setattr(kontext, "denoise", short_of_memory)
    latents = all_latents(kontext, items)
    assert sizes == [4, 2, 2] and len(latents) == 4
    assert "The memory does not hold 4 pictures at a time; going on with 2." in capsys.readouterr().err
    torch.testing.assert_close(latents[4], denoise(items[4]), rtol=1e-5, atol=1e-5)


def test_a_bad_one_fails_alone(kontext, monkeypatch, capsys):
    items = conditioned(kontext, BASE.copies(3))
    denoise = kontext.denoise

    def bad(item, on_step, *, seeds):
        if 6 in seeds:
            on_step(0, torch.zeros(len(seeds), 16, 6, 8))
            raise UserError("NaN")
        return denoise(item, on_step, seeds=seeds)

    monkeypatch.setattr(kontext, "denoise", bad)
    with progress("Denoising", 9) as bar:
        together = Together(kontext, items, count=3, bar=bar)
        assert torch.isfinite(together.latent(1)).all() and torch.isfinite(together.latent(3)).all()
        with pytest.raises(UserError, match="NaN"):
            together.latent(2)
    assert (
        "Denoising: 7/9" in capsys.readouterr().err
    )  # the failed one's step is counted, those taken back are not


def test_steps_point_where_the_straight_line_ends():
    seen = []
    start, end, sigmas = torch.full((1, 1), 5.0), torch.full((1, 1), -1.0), torch.tensor([1.0, 0.6, 0.2, 0.0])
    watch = _Watch(start, sigmas, torch.float32, lambda step, x: seen.append((step, x)))
    for step, sigma in enumerate(sigmas.tolist()[1:]):
        watch(step, end + sigma * (start - end))
    assert [step for step, _ in seen] == [0, 1, 2]
    for _, x in seen:
        torch.testing.assert_close(x, end)
