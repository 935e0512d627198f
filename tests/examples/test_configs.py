"""The ready settings of `examples/configs`: they parse, and take the memory that they say, on the card they are for."""

import re
from pathlib import Path

import pytest
import torch

from kontext.commands import generate_plan, train_needs
from kontext.commands.models import placement
from kontext.commands.train_values import mix
from kontext.memory.choice import Setup
from kontext.memory.estimate import Estimate, Trained
from kontext.memory.needs import Pictures
from kontext.model.transformer import FLUX
from kontext.options.generate import Generate
from kontext.options.resolve import resolve
from kontext.options.train import Train
from tests.commands.published import MODELS
from tests.memory.test_estimate import MEGAPIXEL

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
CARDS = {"8gb": 8, "12gb": 12, "16gb": 16, "24gb": 24, "h100": 80}
CUDA = torch.device("cuda")
PICTURES = Pictures(MEGAPIXEL, steps=28, pixels=2**20, reference=2**20)


def estimates(path: Path) -> tuple[Estimate, str]:
    """Of the published model at 8,704 tokens, and the file's text."""
    text = path.read_text(encoding="utf-8")
    if path.name.endswith(".train.toml"):
        given = {
            "config_file": str(path),
            "dit": "x",
            "dataset_config": "x",
            "output_dir": "x",
            "output_name": "x",
        }
        options = resolve(Train, given)
        assert (
            isinstance(options, Train) and options.network_dim == 32 and options.optimizer_type == "adamw8bit"
        )
        rank_32 = Trained(parameters=112_066_560, optimizer=2 * 112_066_560, ranks=228 * 32)
        needs = train_needs.needs(
            options, FLUX, rank_32, MEGAPIXEL, device=CUDA, pictures=PICTURES, models=MODELS
        )
        asked = mix(options)
        return needs.estimate(Setup(placement(options, CUDA), asked.policy, asked.count)), text
    options = resolve(Generate, {"config_file": str(path), "prompt": "x"})
    assert isinstance(options, Generate)
    needed = generate_plan.needs(options, FLUX, MODELS, PICTURES, device=CUDA)
    return needed.estimate(generate_plan.asked(options, CUDA)), text


@pytest.mark.parametrize("command", ["train", "generate"])
@pytest.mark.parametrize("card", CARDS)
def test_the_peak_is_as_told_and_fits(card: str, command: str) -> None:
    found, text = estimates(CONFIGS / f"{card}.{command}.toml")
    told = re.search(r"Estimated peak: ([\d.]+) GB, in ([\w ]+)[;.]", text)
    host = re.search(r"Host memory: ([\d.]+) GB", text)
    assert told and host
    assert found.peak / 1e9 == pytest.approx(float(told[1]), rel=0.02)
    assert found.largest.name == told[2]
    assert found.host / 1e9 == pytest.approx(float(host[1]), rel=0.02, abs=0.05)
    assert found.peak <= 0.95 * CARDS[card] * 1e9
    assert f"examples/configs/{card}.{command}.toml" in text


@pytest.mark.parametrize("card", CARDS)
def test_a_training_step_is_as_told(card: str) -> None:
    found, text = estimates(CONFIGS / f"{card}.train.toml")
    (step,) = [stage for stage in found.stages if stage.name == "a training step"]
    told = re.search(r"a training step: ([\d.]+) GB", text)
    assert told and (step.device + found.context) / 1e9 == pytest.approx(float(told[1]), rel=0.02)


def test_every_file_is_tested() -> None:
    names = {f"{card}.{command}.toml" for card in CARDS for command in ("train", "generate")}
    assert {path.name for path in CONFIGS.iterdir()} == names
