"""`--vram-budget` at the sizes of the published model: what is chosen, told and refused."""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kontext.commands import budget
from kontext.commands.model_sizes import PictureModels, text_of, vae_of
from kontext.device import Precision
from kontext.errors import UserError
from kontext.memory.choice import Setup
from kontext.memory.estimate import Work
from kontext.memory.needs import PictureNeeds, Pictures, TrainingNeeds
from kontext.memory.placement import Placement
from kontext.memory.policies import Mix
from kontext.options.generate import Generate
from kontext.options.train import Train
from tests.commands.published import MODELS
from tests.memory.test_estimate import MEGAPIXEL, RANK_32, WEIGHTS

CUDA = torch.device("cuda")
BFLOAT16 = Precision(torch.bfloat16, torch.bfloat16)
PICTURES = Pictures(MEGAPIXEL, steps=25, pixels=2**20, reference=2**20)
TRAINING = TrainingNeeds(WEIGHTS, RANK_32, MEGAPIXEL, ahead=32)


def training(**given: object) -> Train:
    paths = {name: Path("x") for name in ("dit", "dataset_config", "output_dir")}
    return Train(output_name="x", **paths, **given)


def chosen(options: Train, needs: TrainingNeeds = TRAINING) -> Mapping[str, object]:
    found = budget.for_training(options, needs, CUDA)
    names = ("blocks_to_swap", "modulation", "checkpointing", "gradient_checkpointing_cpu_offload")
    return {name: getattr(found, name) for name in names}


def test_a_large_budget_changes_nothing() -> None:
    assert chosen(training(vram_budget="60")) == {
        "blocks_to_swap": "0", "modulation": "resident", "checkpointing": "none",
        "gradient_checkpointing_cpu_offload": False,
    }  # fmt: skip


@pytest.mark.parametrize("gibibytes", [5, 8, 12, 16, 24, 40])
def test_what_is_chosen_fits(gibibytes: int, capsys: pytest.CaptureFixture[str]) -> None:
    """By the options that come out, and as it is told."""
    found = chosen(training(vram_budget=str(gibibytes)))
    mix = Mix("offloaded" if found["gradient_checkpointing_cpu_offload"] else "none")
    if mix.policy == "none":
        mix = Mix.read(str(found["checkpointing"]))
    swap = found["blocks_to_swap"]
    placement = Placement("max" if swap == "max" else int(str(swap)), found["modulation"] == "auto")
    peak = TRAINING.estimate(Setup(placement, mix.policy, mix.count)).peak
    assert peak <= gibibytes * 2**30
    told = capsys.readouterr().err
    assert f"{peak / 2**30:.2f} GiB, in a training step" in told


def test_some_blocks_compute_less_again_where_memory_is_left() -> None:
    """24 GiB and weights that stay: what is free goes to as many blocks as it is enough for."""
    found = budget.for_training(training(vram_budget="24", blocks_to_swap="0"), TRAINING, CUDA)
    mix = Mix.read(str(found.checkpointing))
    assert mix.policy in ("selective", "whole") and mix.count is not None and 0 < mix.count < 57
    fewer = Setup(Placement(0, True), mix.policy, mix.count - 1)
    assert TRAINING.estimate(fewer).peak > 24 * 2**30


def test_checkpointing_by_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """--checkpointing auto leaves the weights where they are."""
    monkeypatch.setattr(budget, "free_bytes", lambda device: 30 * 10**9)
    found = chosen(training(checkpointing="auto", blocks_to_swap="10"))
    assert (found["blocks_to_swap"], found["modulation"]) == ("10", "auto")
    assert str(found["checkpointing"]).startswith("selective:")


@pytest.mark.parametrize("gibibytes", [16, 20, 24, 30, 40])
def test_compiled_blocks_are_recomputed_whole_or_not_at_all(gibibytes: int) -> None:
    """What compilers keep in between is their own choice, and no mix is made of it."""
    found = chosen(training(vram_budget=str(gibibytes), compile=True))
    assert found["checkpointing"] in ("none", "whole")
    with pytest.raises(ValueError, match="--checkpointing whole:20 does not go with --compile"):
        training(compile=True, checkpointing="whole:20")


def test_what_is_given_stays() -> None:
    found = chosen(training(vram_budget="24", blocks_to_swap="30", checkpointing="whole"))
    assert (found["blocks_to_swap"], found["checkpointing"]) == ("30", "whole")
    assert chosen(training(vram_budget="40", modulation="resident"))["modulation"] == "resident"
    assert chosen(training(vram_budget="80", gradient_checkpointing=True))["checkpointing"] is None


def test_nothing_fits() -> None:
    with pytest.raises(
        UserError, match=r"--vram-budget 3: nothing fits. The least .* GiB, in a training step"
    ) as error:
        chosen(training(vram_budget="3"))
    least = str(error.value).split("takes is ")[1].split()[0]
    assert chosen(training(vram_budget=f"{float(least) + 0.01:.2f}"))["blocks_to_swap"] == "max"


def test_modulation_that_is_trained_stays() -> None:
    needs = replace(TRAINING, whole_modulation=True)
    assert chosen(training(vram_budget="24"), needs)["modulation"] == "resident"
    with pytest.raises(UserError):
        chosen(training(vram_budget="9"), needs)


def test_the_largest_stage_counts() -> None:
    """T5 in bfloat16 takes 9.5 GB by itself: 8 GiB are enough only with --fp8-t5."""

    def needs(options: Train) -> TrainingNeeds:
        return replace(
            TRAINING,
            pictures=PICTURES,
            vae=vae_of(options, MODELS, CUDA),
            text=text_of(options, MODELS.text, BFLOAT16),
        )

    with pytest.raises(UserError, match="in reading the prompt: --fp8-t5 halves that"):
        chosen(training(vram_budget="8"), needs(training()))
    found = budget.for_training(training(vram_budget="8", fp8_t5=True), needs(training(fp8_t5=True)), CUDA)
    assert found.blocks_to_swap != "0"


def pictures(models: PictureModels = MODELS, **given: object) -> tuple[Generate, Placement]:
    options = Generate(**given)
    vae, text = vae_of(options, models, CUDA), text_of(options, models.text, BFLOAT16)
    found = budget.for_pictures(options, PictureNeeds(WEIGHTS, PICTURES, vae, text), CUDA)
    swap = found.blocks_to_swap
    return found, Placement("max" if swap == "max" else int(swap), found.modulation == "auto")


def test_pictures() -> None:
    assert pictures(vram_budget="40")[1] == Placement()
    assert pictures(vram_budget="20")[1] == Placement(0, True)
    small, placement = pictures(vram_budget="6", fp8_t5=True)
    assert placement.swap not in (0, "max") and placement.modulation and small.vae_tiling == "auto"


def test_the_autoencoder_works_in_strips_where_it_must() -> None:
    """Decoding a picture of 4 megapixels in float32 takes 12.9 GB at once, 6.4 in strips."""
    large = replace(PICTURES, work=Work(1, 1000, 2), pixels=4 * 2**20)
    options = Generate(vram_budget="8", fp8_t5=True)
    needs = PictureNeeds(
        WEIGHTS, large, vae_of(options, MODELS, CUDA), text_of(options, MODELS.text, BFLOAT16)
    )
    assert budget.for_pictures(options, needs, CUDA).vae_tiling == "on"
    whole = Generate(vram_budget="8", fp8_t5=True, vae_tiling="off")
    with pytest.raises(UserError, match="in decoding the picture"):
        budget.for_pictures(whole, needs, CUDA)


def test_a_cpu_has_nothing_to_choose(capsys: pytest.CaptureFixture[str]) -> None:
    options = training(vram_budget="8")
    assert budget.for_training(options, TRAINING, torch.device("cpu")) is options
    assert "on a CPU there is nothing to choose" in capsys.readouterr().err


def test_pictures_do_not_wait_for_what_trains():
    """Importing training and accelerate takes half a second."""
    script = "import sys, kontext.commands.generate; print([m for m in sys.modules if m.startswith(('accelerate', 'kontext.training'))])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
