"""The stages of a picture, and the door for programs."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from kontext.errors import UserError
from kontext.generation import batch, pipeline
from kontext.generation.denoising import true_guidance
from kontext.generation.outputs import Writer
from kontext.generation.parts import ModelFiles, Runtime
from kontext.generation.pipeline import Kontext
from kontext.generation.request import Request
from kontext.memory.placement import Placement
from kontext.model.autoencoder import Autoencoder

SMALL = {"width": 64, "height": 64, "steps": 1, "seed": 1, "resize_references": False}


@pytest.fixture
def files(tiny_files):
    return ModelFiles(
        tiny_files.dit, tiny_files.vae, tiny_files.t5, tiny_files.clip,
        tiny_files.t5_tokenizer, tiny_files.clip_tokenizer,
    )  # fmt: skip


@pytest.fixture
def kontext(files):
    return Kontext(files, Runtime(torch.device("cpu"), torch.float32, t5_max_length=16))


@pytest.fixture
def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 96, 3), dtype=np.uint8))


def test_the_door_for_programs(kontext, tiny_files, photo, tmp_path):
    pipe = Kontext.load(
        dit=tiny_files.dit, vae=str(tiny_files.vae), text_encoder1=tiny_files.t5,
        text_encoder2=tiny_files.clip, device="cpu", dtype="float32",
    )  # fmt: skip
    pipe.runtime = replace(pipe.runtime, t5_max_length=16)
    picture = pipe.edit(photo, "make it red", **SMALL)
    assert picture.size == (64, 64) and picture.mode == "RGB"
    photo.save(tmp_path / "photo.png")
    by_path = pipe.edit(str(tmp_path / "photo.png"), "make it red", **SMALL)
    by_request = kontext.picture(Request("make it red", (photo,), **SMALL))
    assert np.array_equal(picture, by_path) and np.array_equal(picture, by_request)
    assert not np.array_equal(picture, pipe.edit(None, "make it red", **SMALL))


def test_large_models_are_let_go_after_their_stage_unless_kept(kontext, files):
    conditioned = kontext.condition(kontext.frame(Request("red", **SMALL)))
    encoders = weakref.ref(kontext.text_encoders().t5)
    kontext.release(kontext.text_encoders)
    assert encoders() is None
    kontext.denoise(conditioned)
    transformer = weakref.ref(kontext.transformer())
    kontext.release(kontext.transformer)
    assert transformer() is None
    keeping = Kontext(files, Runtime(torch.device("cpu"), torch.float32, keep=True))
    kept = keeping.text_encoders()
    keeping.release(keeping.text_encoders)
    assert keeping.text_encoders() is kept


@pytest.mark.parametrize("keep", [False, True])
def test_the_autoencoder_waits_on_the_host_while_larger_models_work(kontext, photo, monkeypatch, keep):
    events, load = [], pipeline.open_transformer
    for name in ("cpu", "encode", "decode"):
        plain = getattr(Autoencoder, name)
        monkeypatch.setattr(
            Autoencoder, name, lambda self, *x, plain=plain, name=name: events.append(name) or plain(self, *x)
        )
    read = pipeline.open_text_encoders
    monkeypatch.setattr(pipeline, "open_text_encoders", lambda *x: events.append("text") or read(*x))
    monkeypatch.setattr(pipeline, "open_transformer", lambda *x: events.append("transformer") or load(*x))
    kontext.runtime = replace(kontext.runtime, keep=keep)
    kontext.picture(Request("x", (photo,), **SMALL))
    aside = [] if keep else ["cpu"]
    assert events == ["encode", *aside, "text", *aside, "transformer", "decode"]


def test_a_text_is_encoded_once(kontext, monkeypatch):
    framed = kontext.frame(Request("red", **SMALL))
    first = kontext.condition(framed)
    kontext.text_encoders.free()
    monkeypatch.setattr(kontext, "text_encoders", None)
    assert kontext.condition(framed).positive.txt is first.positive.txt


@pytest.mark.parametrize(
    "image, said",
    [
        (Image.new("RGB", (96, 64), "red"), ""),
        (Image.new("RGB", (97, 79), "red"), "97x79 cropped, 96x64"),
        (Image.new("RGBA", (96, 64), (255, 0, 0, 128)), "transparency laid on white"),
    ],
)
def test_what_is_done_to_a_reference_is_said(kontext, image, said, capsys):
    kontext.autoencoder()
    capsys.readouterr()
    framed = kontext.frame(Request("x", (image,), resize_references=False))
    assert (framed.width, framed.height) == (96, 64) and framed.references[0].shape == (1, 16, 8, 12)
    heard = capsys.readouterr().err
    assert said in heard and bool(heard) == bool(said)


def test_a_tiny_reference_is_refused_by_name(kontext, tmp_path):
    Image.new("RGB", (15, 100)).save(tmp_path / "thin.png")
    with pytest.raises(UserError, match=r"thin\.png: 15x100 pixels are too few"):
        kontext.frame(Request("x", (tmp_path / "thin.png",)))


def test_the_reference_is_its_posterior_mean(kontext, photo):
    """Twice the same, and what the global random state is makes no difference."""
    first = kontext.frame(Request("x", (photo,), resize_references=False)).references[0]
    torch.manual_seed(99)
    assert torch.equal(first, kontext.frame(Request("x", (photo,), resize_references=False)).references[0])


def test_a_seed_is_drawn_where_none_is_given(kontext):
    seeds = {kontext.frame(Request("x", width=64, height=64)).request.seed for _ in range(3)}
    assert len(seeds) == 3 and all(0 <= seed < 2**32 for seed in seeds)


def test_float16_overflow_is_told_from_damaged_weights(kontext):
    nothing = torch.full((1, 16, 8, 8), float("nan"))
    with pytest.raises(UserError, match="Decoding: .* the weights or a LoRA are damaged"):
        kontext.decode(nothing)
    kontext.runtime = replace(kontext.runtime, vae_dtype=torch.float16)
    kontext.autoencoder().half()
    with pytest.raises(UserError, match="float16 overflows. Use --vae-dtype bfloat16"):
        kontext.decode(nothing)


def test_true_guidance_by_hand():
    away, towards = torch.tensor([1.0]), torch.tensor([3.0])
    guided = true_guidance(lambda x, t: towards, lambda x, t: away, 2.5)
    assert guided(away, away).item() == 1 + 2.5 * (3 - 1)


def test_steps_are_reported_in_order(kontext):
    steps = []
    request = Request("x", width=64, height=64, steps=3)
    kontext.denoise(kontext.condition(kontext.frame(request)), lambda step, x: steps.append(step))
    assert steps == [0, 1, 2]


def test_a_batch_outlives_an_error_of_torch_but_not_a_model_that_cannot_be_loaded(
    kontext, files, tmp_path, monkeypatch
):
    denoise, calls = kontext.denoise, []

    def failing(conditioned, on_step, **more):
        calls.append(conditioned)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return denoise(conditioned, on_step, **more)

    monkeypatch.setattr(kontext, "denoise", failing)
    requests = [Request("red", **SMALL), Request("blue", **SMALL)]
    failures = batch.run_batch(kontext, requests, Writer(tmp_path, name="x"))
    assert [(f.number, f.prompt) for f in failures] == [(1, "red")] and "out of memory" in str(
        failures[0].error
    )
    assert [path.name for path in tmp_path.iterdir()] == ["x_002.png"]
    broken = Kontext(replace(files, dit=files.vae), kontext.runtime)
    with pytest.raises(UserError, match="--dit expects"):
        batch.run_batch(broken, requests, Writer(tmp_path))


@pytest.mark.parametrize("quantization", [None, "fp8_scaled"])
def test_weights_on_the_host_change_no_digit(files, photo, quantization):
    """Streamed blocks and modulation computed ahead: the same latents."""
    request = Request("make it red", (photo,), **SMALL | {"steps": 2})
    there = Runtime(torch.device("cpu"), torch.float32, t5_max_length=16, quantization=quantization)
    streamed = replace(there, placement=Placement(swap="max", modulation=True))
    latents = [
        k.denoise(k.condition(k.frame(request)))
        for k in (Kontext(files, runtime) for runtime in (there, streamed))
    ]
    assert torch.equal(*latents)
