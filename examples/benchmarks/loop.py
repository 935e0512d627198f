"""What training costs beside the model: `python examples/benchmarks/loop.py`.

`kontext train` with the model's answer replaced by its question. Loading and drawing, loss, backward, clipping, AdamW on
a small adapter, history, report and saving are as ever. Rates are of windows of 250 steps, by the times in the run's
history: the fastest tells what the loop can do, the median what else the machine did.

Options: --steps n, --workers n.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kontext.cli import main as kontext
from kontext.console import say
from kontext.denoiser import Conditioning
from kontext.model.transformer import Modulations, Transformer
from kontext.training import objective
from kontext.training.history import read_history

MODELS = Path(__file__).resolve().parents[1] / "small_world" / "models"
ENCODERS = ("--text-encoder1", MODELS / "t5.safetensors", "--text-encoder2", MODELS / "clip.safetensors")
CPU = ("--device", "cpu", "--dtype", "float32")
SIZE, ITEMS, WINDOW = 48, 16, 250
LEFT_OUT = r"(?!double_blocks\.0\.img_attn\.qkv$).*"  # all but one: the adapter belongs to the model


class Nothing:
    """Stands for the denoiser: answers with the noisy latent, and lets gradients reach the adapter."""

    adapter: Tensor | None = None
    seconds: list[float] = []  # of CPU time that this process had taken at each step

    def __init__(self, transformer: Transformer, conditioning: Conditioning) -> None:
        if Nothing.adapter is None:
            Nothing.adapter = next(p for p in transformer.parameters() if p.requires_grad)

    def __call__(self, x: Tensor, t: Tensor, modulations: Modulations | None) -> Tensor:
        assert Nothing.adapter is not None
        Nothing.seconds.append(time.process_time())
        return x + 0 * Nothing.adapter.sum()


def cached(folder: Path) -> Path:
    """A dataset file with pictures of plain colours and its caches."""
    source = random.Random(0)
    for number in range(ITEMS):
        for side in ("before", "after"):
            (folder / side).mkdir(exist_ok=True)
            colour = tuple(source.randrange(256) for _ in range(3))
            Image.new("RGB", (SIZE, SIZE), colour).save(folder / side / f"{number}.png")
        (folder / "after" / f"{number}.txt").write_text("make the circle red")
    config = folder / "dataset.toml"
    config.write_text(
        f"[general]\nresolution = [{SIZE}, {SIZE}]\n[[datasets]]\nimage_directory = '{folder}/after'\n"
        f"control_directory = '{folder}/before'\ncache_directory = '{folder}/cache'\n"
    )
    run("cache-latents", "--dataset-config", config, "--vae", MODELS / "ae.safetensors", *CPU)
    run("cache-text", "--dataset-config", config, *ENCODERS, "--t5-max-length", 8, *CPU)
    return config


def run(*words: object) -> None:
    assert kontext([str(word) for word in words]) == 0


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--steps", type=int, default=5000)
    options.add_argument("--workers", type=int, default=1)
    given = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        config = cached(folder)
        objective.Denoiser = Nothing
        run(
            "train", "--dataset-config", config, "--dit", MODELS / "dit.safetensors", *CPU, "--seed", 1,
            "--network-args", f"exclude_patterns={LEFT_OUT}", "--max-train-steps", given.steps,
            "--max-data-loader-n-workers", given.workers, "--save-every-n-steps", WINDOW, "--output-dir", folder / "out",
            "--output-name", "nothing",
        )  # fmt: skip
        times = read_history(folder / "out" / "nothing.history.jsonl").time
    rates = WINDOW / np.diff(times[::WINDOW])
    busy = np.diff(Nothing.seconds[::WINDOW]).min() / WINDOW
    say(
        f"{rates.max():.0f} steps/s in the fastest window, {np.median(rates):.0f} in the median one; "
        f"{1000 * busy:.2f} ms a step are CPU time of the main process"
    )


if __name__ == "__main__":
    main()
