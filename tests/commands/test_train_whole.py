"""`kontext train --network-module none`: the transformer itself is trained, and written as it was."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxKontextPipeline, FluxTransformer2DModel
from PIL import Image
from torch import Tensor

from kontext.cli import main
from kontext.data.batches import open_batches
from kontext.data.items import Skips
from kontext.timesteps import Timesteps
from kontext.training.feed import Example, Examples
from kontext.training.objective import Objective
from kontext.training.plan import Plan
from tests.bfl_names import bfl_transformer
from tests.tiny import DOUBLE, SINGLE, TEXT_LENGTH, TinyFiles
from tests.training.command import files, metadata
from tests.training.dataset import Cached
from tests.training.whole import differ, on, train, weights, with_validation, words

# ---- against diffusers and a plain loop ----


def tokens(latents: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """Packed latents and their positions."""
    rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
    packed = FluxKontextPipeline._pack_latents(latents, len(latents), 16, *latents.shape[-2:])
    return packed, torch.tensor([[float(index), y, x] for y in range(rows) for x in range(columns)])


def plain_loss(model: Any, example: Example, t: Tensor) -> Tensor:
    batch = example.batch
    levels = t.view(-1, 1, 1, 1)
    img, img_ids = tokens((1 - levels) * batch.latents + levels * example.noise, 0)
    reference, reference_ids = tokens(batch.references[0], 1)
    predicted = model(
        hidden_states=torch.cat([img, reference], 1),
        timestep=t,
        guidance=torch.ones(len(t)),
        pooled_projections=batch.vector,
        encoder_hidden_states=batch.txt,
        txt_ids=torch.zeros(TEXT_LENGTH, 3),
        img_ids=torch.cat([img_ids, reference_ids]),
        return_dict=False,
    )[0][:, : img.shape[1]]
    return (predicted - tokens(example.noise - batch.latents, 0)[0]).square().mean()


def plain_training(cached: Cached, model: Any, steps: int) -> None:
    """AdamW as anybody would write it, on what the command draws for its seed."""
    batches = open_batches(cached.config, seed=42, skips=Skips(strict=True), encoders={})
    examples = Examples(batches, Plan(len(batches.sizes(0)), 1, 1, steps), seed=42)
    objective = Objective(torch.nn.Identity(), Timesteps(), 1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        example = examples.example(step, step)
        plain_loss(model, example, objective.levels(example)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def test_it_equals_a_plain_loop_with_diffusers(
    cached: Cached, tiny_files: TinyFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps from the same weights, through the layout of diffusers in several files, and BFL's."""
    model = FluxTransformer2DModel.from_pretrained(tiny_files.dit_sharded)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain_training(cached, model.train(), 3)
    expected = model.state_dict()
    assert train(on(cached, tiny_files, tiny_files.dit_sharded), tmp_path, "--max-train-steps 3") == 0
    found = FluxTransformer2DModel.from_pretrained(tmp_path / "edit").state_dict()
    assert len(differ(before, found)) == len(before)
    assert train(cached, tmp_path / "bfl", "--max-train-steps 3 --gradient-checkpointing") == 0
    for name, tensor in expected.items():
        moved = (tensor - before[name]).norm()
        assert (found[name] - tensor).norm() < 1e-3 * moved, name
    in_bfl = bfl_transformer(found, DOUBLE, SINGLE)
    for name, tensor in weights(tmp_path / "bfl" / "edit.safetensors").items():
        torch.testing.assert_close(tensor, in_bfl[name], rtol=1e-4, atol=1e-5)


# ---- layouts and precisions ----

LAYOUTS = ("dit", "dit_prefixed", "dit_diffusers", "dit_sharded", "pipeline")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_that_was_loaded_is_written(
    layout: str, cached: Cached, tiny_files: TinyFiles, tmp_path: Path
) -> None:
    """The same names, files, shapes and types; only what a pattern chooses has changed; no piece is left behind."""
    base: Path = getattr(tiny_files, layout)
    chosen = "--network-args include_patterns=double_blocks.1.img_mlp.2|final_layer.*"
    assert train(on(cached, tiny_files, base), tmp_path, f"--max-train-steps 2 {chosen}") == 0
    made = tmp_path / ("edit" if base.is_dir() else "edit.safetensors")
    assert files(tmp_path) == [made.name]
    home = base / "transformer" if layout == "pipeline" else base
    if base.is_dir():
        assert sorted(path.name for path in made.iterdir()) == sorted(path.name for path in home.iterdir())
        for index in home.glob("*.index.json"):
            assert json.loads((made / index.name).read_text()) == json.loads(index.read_text())
    before, after = weights(home), weights(made)
    assert {name: tensor.dtype for name, tensor in before.items()} == {n: t.dtype for n, t in after.items()}
    changed = {name.removeprefix("model.diffusion_model.") for name in differ(before, after)}
    in_bfl = {"double_blocks.1.img_mlp.2", "final_layer.linear", "final_layer.adaLN_modulation.1"}
    in_diffusers = {"transformer_blocks.1.ff.net.2", "proj_out", "norm_out.linear"}
    modules = in_bfl if layout in ("dit", "dit_prefixed") else in_diffusers
    assert changed == {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}


def test_the_file_says_what_it_is_and_makes_pictures(
    cached: Cached, tiny_files: TinyFiles, tmp_path: Path, generate: Any
) -> None:
    settings = "--max-train-steps 3 --training-comment hello --learning-rate 1e-2"
    assert train(cached, tmp_path, f"{settings} --save-precision bf16 --ema-decay 0.5") == 0
    made = tmp_path / "edit.safetensors"
    assert {tensor.dtype for tensor in weights(made).values()} == {torch.bfloat16}
    told = metadata(made)
    assert told["ss_training_comment"] == "hello" and told["modelspec.architecture"] == "flux-1-dev"
    assert told["ss_steps"] == "3" and not any("network" in name for name in told)
    assert metadata(tmp_path / "edit-ema.safetensors")["ss_ema_decay"] == "0.5"
    assert len(differ(weights(made), weights(tmp_path / "edit-ema.safetensors"))) > 50
    pictures = []
    for name, dit in (("base", tiny_files.dit), ("trained", made)):
        code, told = generate("--seed", 1, "--prompt", "remove it", out=tmp_path / name, dit=dit)
        assert code == 0, told
        (picture,) = (tmp_path / name).glob("*.png")
        pictures.append(Image.open(picture).tobytes())
    assert pictures[0] != pictures[1]


def test_what_is_trained_is_float32_unless_bfloat16_is_asked_for(
    cached: Cached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of 1e-5 is kept by float32 weights computed with in bfloat16, and lost in bfloat16 itself."""
    monkeypatch.setattr("kontext.device.is_fast", lambda dtype: True)
    settings = "--max-train-steps 1 --learning-rate 1e-5 --optimizer-args weight_decay=0.0"
    made = {}
    for name, precision in (
        ("float32", "--dtype float32"),
        ("mixed", "--dtype bfloat16"),
        ("full", "--full-bf16"),
    ):
        line = [*words(cached, tmp_path / name, settings), *precision.split()]
        if name == "full":  # the dtype that the other tests set would contradict it
            place = line.index("--dtype")
            del line[place : place + 2]
        assert main(line) == 0
        made[name] = weights(tmp_path / name / "edit.safetensors")
    base = weights(Path(cached.models[cached.models.index("--dit") + 1]))
    moved = {
        name: torch.cat([(tensor - base[n]).flatten().abs() for n, tensor in tensors.items()])
        for name, tensors in made.items()
    }
    assert (moved["mixed"] > 0).float().mean() > 0.9 and moved["mixed"].max() < 2e-5
    assert (moved["float32"] - moved["mixed"]).abs().mean() < 0.3 * moved["float32"].mean()
    kept = torch.cat([(t - base[n].bfloat16()).flatten().abs() for n, t in made["full"].items()])
    assert (kept == 0).float().mean() > 0.8


# ---- as every other run ----


@pytest.mark.parametrize(
    "more", ["--optimizer-type adamw8bit --optimizer-args min_8bit_size=256", "--ema-decay 0.9"]
)
def test_a_resumed_run_writes_the_same_bytes(
    more: str, cached: Cached, tiny_files: TinyFiles, tmp_path: Path
) -> None:
    there = on(cached, tiny_files, tiny_files.dit_sharded)
    settings = (
        f"{more} --gradient-accumulation-steps 2 --max-train-steps 4 --save-every-n-steps 2 --save-state"
    )
    assert train(there, tmp_path, settings) == 0
    made = [
        path
        for path in tmp_path.rglob("*.safetensors")
        if "step" not in str(path) and "state" not in str(path)
    ]
    assert len(made) >= 2
    whole = {path: path.read_bytes() for path in made}
    for folder in {path.parent for path in made} | {tmp_path / "edit-state"}:
        shutil.rmtree(folder)
    assert train(there, tmp_path, f"{settings} --resume auto") == 0
    assert {path: path.read_bytes() for path in made} == whole


def test_folders_of_old_saves_are_deleted(cached: Cached, tiny_files: TinyFiles, tmp_path: Path) -> None:
    there = on(cached, tiny_files, tiny_files.dit_sharded)
    assert train(there, tmp_path, "--max-train-epochs 3 --save-every-n-epochs 1 --save-last-n-epochs 1") == 0
    assert files(tmp_path) == ["edit", "edit-000002"]


def test_the_best_weights_and_samples(
    cached: Cached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kontext.data.images.PREFERRED_RESOLUTIONS", ((64, 64), (96, 64)))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("remove it --w 64 --h 64 --s 2\n")
    more = f"--validate-every-n-steps 1 --sample-prompts {prompts} --sample-every-n-steps 2 --sample-at-first"
    assert train(with_validation(cached, tmp_path), tmp_path / "a", f"--max-train-steps 2 {more}") == 0
    assert train(cached, tmp_path / "b", "--max-train-steps 2") == 0
    a, b = (weights(tmp_path / name / "edit.safetensors") for name in "ab")
    assert not differ(a, b)
    assert (tmp_path / "a" / "edit-best.safetensors").is_file()
    first, last = (Image.open(tmp_path / "a" / "sample" / f"edit_00000{i}_grid.png") for i in (0, 2))
    assert first.tobytes() != last.tobytes()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("--network-dim 8", "--network-dim with --network-module none: it is about adapters"),
        ("--base-weights a.safetensors", "merge them first with kontext merge"),
        (
            "--fp8-scaled",
            "--fp8-scaled with --network-module none: weights that are trained cannot be kept in few bits",
        ),
        ("--blocks-to-swap 1", "cannot be streamed from the host"),
        (
            "--network-args factor=4",
            "factor is not known. Known are include_patterns, exclude_patterns, lr_patterns",
        ),
        ("--network-args exclude_patterns=.*", "No module is left to train"),
        ("--network-args lr_patterns=x.*=1e-4", "matches no trained module"),
        ("--full-bf16", "--full-bf16 and --dtype float32 contradict each other"),
        ("--network-module lora --full-bf16", "--full-bf16 is for --network-module none"),
    ],
)
def test_what_makes_no_sense_is_refused(
    settings: str, told: str, cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(cached, tmp_path, settings) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_the_base_is_not_written_over(
    cached: Cached, tiny_files: TinyFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "edit.safetensors"
    base.write_bytes(tiny_files.dit.read_bytes())
    assert train(on(cached, tiny_files, base), tmp_path, "") == 2
    assert "is --dit itself" in capsys.readouterr().err
    assert base.read_bytes() == tiny_files.dit.read_bytes()
