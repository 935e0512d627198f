"""Models come when called for and go when let go, LoRAs or not."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kontext.errors import UserError
from kontext.generation.parts import (
    Loras,
    ModelFiles,
    Part,
    Runtime,
    open_autoencoder,
    open_text_encoders,
    open_transformer,
)

RUNTIME = Runtime(torch.device("cpu"), torch.float32)
QUANTISED = Runtime(torch.device("cpu"), torch.float32, quantization="fp8_scaled")
from kontext.lora.strength import Strength


def test_a_part_loads_once_and_again_after_it_was_let_go():
    loads = []
    part = Part(lambda: loads.append(None) or nn.Linear(2, 2))
    first = part()
    assert part() is first and len(loads) == 1
    part.free()
    part.free()
    assert part() is not first and len(loads) == 2


def test_a_model_in_a_circle_is_let_go_too():
    model = nn.Linear(2, 2)
    model.__dict__["circle"] = model
    seen, models = weakref.ref(model), [model]
    part = Part(models.pop)
    part()
    del model
    gc.disable()
    try:
        part.free()
        assert seen() is None
    finally:
        gc.enable()


@pytest.fixture
def lora(tmp_path):
    stem = "lora_unet_double_blocks_0_img_attn_proj"
    down, up = torch.ones(1, 64), torch.ones(64, 1)
    save_file({f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}, tmp_path / "a.safetensors")
    return Loras((tmp_path / "a.safetensors",), (0.5,))


def weight_of(model):
    """The weight that acts in the linear which `lora` changes: its output for the identity."""
    linear = model.double_blocks[0].img_attn.proj
    return (linear(torch.eye(64)) - linear(torch.zeros(1, 64))).T


def test_a_lora_is_merged_into_whole_weights_and_attached_to_quantised_ones(tiny_files, lora):
    files = ModelFiles(dit=tiny_files.dit)
    plain, _ = open_transformer(files, RUNTIME, Loras(), ())
    merged, strengths = open_transformer(files, RUNTIME, lora, lora.multipliers)
    assert strengths is None
    assert torch.allclose(weight_of(merged) - weight_of(plain), torch.full((64, 64), 0.5), atol=1e-6)
    plain, _ = open_transformer(files, QUANTISED, Loras(), ())
    attached, strengths = open_transformer(files, QUANTISED, lora, lora.multipliers)
    assert torch.allclose(weight_of(attached) - weight_of(plain), torch.full((64, 64), 0.5), atol=1e-6)
    strengths[:] = [Strength(0.25)]
    assert torch.allclose(weight_of(attached) - weight_of(plain), torch.full((64, 64), 0.25), atol=1e-6)


def test_a_lora_is_merged_in_float32_and_rounded_once_into_16_bits(tiny_files, lora):
    """Also where 16 bits are only what weights are kept in."""
    files = ModelFiles(dit=tiny_files.dit)
    base = load_file(tiny_files.dit)["double_blocks.0.img_attn.proj.weight"]
    for runtime in (replace(RUNTIME, kept=torch.bfloat16), replace(RUNTIME, dtype=torch.bfloat16)):
        merged, strengths = open_transformer(files, runtime, lora, lora.multipliers)
        assert strengths is None
        assert torch.equal(merged.double_blocks[0].img_attn.proj.weight, (base + 0.5).bfloat16())
    attached, strengths = open_transformer(
        files, replace(RUNTIME, kept=torch.bfloat16), replace(lora, attach=True), lora.multipliers
    )
    assert len(strengths) == 1
    assert torch.allclose(weight_of(attached), base.bfloat16().float() + 0.5, atol=1e-6)


def test_no_lora_is_merged_into_weights_of_4_bits(tiny_files, lora):
    """Not even where merging is asked for, as --base-weights does: it says what to do instead."""
    files, runtime = ModelFiles(dit=tiny_files.dit), replace(RUNTIME, quantization="nf4")
    with pytest.raises(
        UserError, match="a.safetensors cannot be merged into weights of 4 bits.*--lora-attach"
    ):
        open_transformer(files, runtime, replace(lora, merge=True), lora.multipliers)
    open_transformer(files, runtime, Loras(merge=True), ())


def test_weights_that_are_not_multiplied_in_8_bits_are_told_of(tiny_files, tmp_path, capsys):
    """A file in fp8 stays as it is: with scales for parts of rows, it is restored to be multiplied."""
    name, state = "double_blocks.0.img_attn.proj", load_file(tiny_files.dit)
    state[f"{name}.weight"] = state[f"{name}.weight"].to(torch.float8_e4m3fn)
    state[f"{name}.weight_scale"] = torch.ones(64, 2)
    save_file(state, tmp_path / "blocks.safetensors")
    runtime = replace(RUNTIME, quantization="fp8_fast")
    open_transformer(ModelFiles(dit=tiny_files.dit), runtime, Loras(), ())
    kept = replace(runtime, kept=torch.bfloat16)  # which modulation is in then
    open_transformer(ModelFiles(dit=tiny_files.dit), kept, Loras(), ())
    assert "multiplied" not in capsys.readouterr().err
    open_transformer(ModelFiles(dit=tmp_path / "blocks.safetensors"), runtime, Loras(), ())
    assert "1 of 20 weights are not multiplied in 8 bits" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("mode", [None, "fp8", "nf4"])
def test_weights_in_fp8_that_grow_are_told_of(tiny_files, tmp_path, capsys, mode):
    state = load_file(tiny_files.dit)
    wide = {name for name, value in state.items() if value.ndim == 2}
    state = {name: value.to(torch.float8_e4m3fn) for name, value in state.items()}
    save_file(state, tmp_path / "fp8.safetensors")
    files = ModelFiles(dit=tmp_path / "fp8.safetensors")
    open_transformer(files, replace(RUNTIME, quantization=mode, kept=torch.bfloat16), Loras(), ())
    told = f"{len(wide)} weights are in 8 bits there, and take 2 times the memory here. --fp8 keeps them"
    assert (told in " ".join(capsys.readouterr().err.split())) == (mode is None)
    open_transformer(ModelFiles(dit=tiny_files.dit), RUNTIME, Loras(), ())
    assert "8 bits" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "load, option",
    [
        (lambda: open_autoencoder(ModelFiles(), RUNTIME), "--vae"),
        (lambda: open_text_encoders(ModelFiles(), RUNTIME), "--text-encoder1"),
        (lambda: open_transformer(ModelFiles(), RUNTIME, Loras(), ()), "--dit"),
    ],
)
def test_a_part_without_a_file_is_named(load, option):
    with pytest.raises(UserError, match=f"{option} must be given"):
        load()
