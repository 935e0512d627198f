"""What the commands give on a GPU is what they give on a CPU: `pytest -m gpu` where there is one."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from kontext.cli import main
from tests.tiny import TinyFiles
from tests.training.command import words
from tests.training.dataset import Cached, cached_dataset

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICES = ("cpu", "cuda")
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory, tiny_files: TinyFiles) -> Cached:
    return cached_dataset(tmp_path_factory.mktemp("edits"), tiny_files)


def on(device: str, command: list[str]) -> list[str]:
    """The same command for another device. A CPU compiles nothing: that takes minutes there."""
    place = command.index("--device") + 1
    moved = [*command[:place], device, *command[place + 1 :]]
    return [word for word in moved if device == "cuda" or word != "--compile"]


def run(command: list[str]) -> None:
    """In this process, whose other runs may have been on another device."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    assert main([*command, "--debug"]) == 0


def apart(one: Tensors, other: Tensors) -> float:
    """|one - other| / |one| over all tensors."""
    assert one.keys() == other.keys()
    difference = sum((one[name].double() - other[name].double()).square().sum() for name in one)
    return float((difference / sum(value.double().square().sum() for value in one.values())).sqrt())


def trained(cached: Cached, folder: Path, settings: str) -> list[Tensors]:
    """The adapter of each device."""
    found = []
    for device in DEVICES:
        run(on(device, words(cached, folder / device, f"--max-train-steps 4 {settings}")))
        found.append(load_file(folder / device / "edit.safetensors"))
    return found


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ("", 0.02),
        ("--checkpointing selective --gradient-accumulation-steps 2 --ema-decay 0.9", 0.02),
        ("--blocks-to-swap max --gradient-checkpointing", 0.02),
        ("--blocks-to-swap 2 --gradient-checkpointing-cpu-offload --modulation resident", 0.02),
        ("--vram-budget auto --scale-weight-norms 0.01", 0.02),
        ("--network-module lokr --network-args factor=4 --int8", 0.02),
        ("--network-args dora=true --fp8-scaled", 0.02),
        ("--optimizer-type adamw8bit --network-module loha", 0.1),
        ("--nf4 --optimizer-type prodigy --learning-rate 1", 0.1),
        ("--fp8-fast", 0.3),
        ("--int8-fast", 0.3),
        ("--dtype bfloat16 --fp8-fast --compile --optimizer-type sgd", 0.3),
    ],
)
def test_training(cached: Cached, tmp_path: Path, settings: str, bound: float) -> None:
    assert apart(*trained(cached, tmp_path, settings)) < bound


def picture(command: list[str], folder: Path) -> np.ndarray:
    run([*command, "--save-path", str(folder)])
    (path,) = folder.glob("*.png")
    return np.asarray(Image.open(path).convert("RGB"), dtype=np.float64)


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ("", 2),
        ("--blocks-to-swap max --sampler dpmpp_2m --vae-tiling on", 2),
        ("--vram-budget auto --true-cfg-scale 2 --negative-prompt ugly --sampler heun", 2),
        ("--images-per-prompt 1 --step-cache 0.01 --split-attn --fp8-t5", 2),
        ("--nf4", 2),
        ("--fp8-fast", 10),
        ("--compile", 2),
    ],
)
def test_pictures(cached: Cached, tmp_path: Path, settings: str, bound: float) -> None:
    asked = ["--prompt", "make it red", "--control-image", str(cached.reference), "--no-resize-control"]
    asked += ["--seed", "1", "--infer-steps", "3", "--image-size", "64", "64", *settings.split()]
    command = ["generate", *cached.models[2:], *asked]
    pictures = [picture(on(device, command), tmp_path / device) for device in DEVICES]
    assert np.abs(pictures[0] - pictures[1]).mean() < bound  # of 255; convolutions may use TF32


@pytest.mark.parametrize("name", ["latents", "text"])
def test_caches(cached: Cached, tmp_path: Path, tiny_files: TinyFiles, name: str) -> None:
    found = []
    for device in DEVICES:
        config = tmp_path / f"{device}.toml"
        there = cached.config.parent / "cache"
        config.write_text(cached.config.read_text().replace(str(there), str(tmp_path / device)))
        command = [f"cache-{name}", "--dataset-config", str(config), "--device", device]
        text = cached.models[cached.models.index("--text-encoder1") :]
        command += text if name == "text" else ["--vae", str(tiny_files.vae), "--num-workers", "2"]
        run(command)
        files = sorted((tmp_path / device).glob("*.safetensors"))
        found.append({f"{f.name} {key}": value for f in files for key, value in load_file(f).items()})
    assert found[0] and apart(*found) < 0.01


@pytest.mark.parametrize(
    "settings", ["", "--save-dtype bfloat16", "--save-dtype fp8_scaled", "--layout diffusers"]
)
@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_merging(cached: Cached, tmp_path: Path, tiny_files: TinyFiles, kind: str, settings: str) -> None:
    run(words(cached, tmp_path, f"--max-train-steps 1 --network-module {kind}"))
    adapter = ["--lora-weight", str(tmp_path / "edit.safetensors"), "--lora-multiplier", "20"]
    found = []
    for device in DEVICES:
        out = tmp_path / f"{device}.safetensors"
        command = ["merge", "--dit", str(tiny_files.dit), *adapter, *settings.split(), "--device", device]
        run([*command, "--save-merged-model", str(out)])
        found.append(load_file(out))
    assert apart(*found) < 1e-4


def test_extracting(cached: Cached, tmp_path: Path, tiny_files: TinyFiles) -> None:
    def merged(path: Path, device: str, *adapter: str) -> Callable[[], Tensors]:
        run(
            [
                "merge",
                "--dit",
                str(tiny_files.dit),
                *adapter,
                "--device",
                device,
                "--save-merged-model",
                str(path),
            ]
        )
        return lambda: load_file(path)

    run(words(cached, tmp_path, "--max-train-steps 1"))
    tuned = tmp_path / "tuned.safetensors"
    expected = merged(tuned, "cpu", "--lora-weight", str(tmp_path / "edit.safetensors"))()
    merged(tmp_path / "lora.safetensors", "cuda", "--extract", str(tuned), "--rank", "4")
    again = merged(
        tmp_path / "again.safetensors", "cpu", "--lora-weight", str(tmp_path / "lora.safetensors")
    )()
    assert apart(expected, again) < 1e-4
