"""Defaults, config file and command line become one model; faults become one line each."""

from pathlib import Path

import pytest
from pydantic import model_validator

from kontext.errors import UserError
from kontext.options.base import Options, option
from kontext.options.resolve import resolve
from kontext.options.train import Train
from tests.options.models import Everything

FILES = {"dit": "d", "vae": "v"}


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text('dit = "file"\nvae = "file"\nsteps = 7\nlora-weight = ["a", "b"]\nshuffle = false\n')
    options = resolve(
        Everything, {"config_file": str(path), "dit": "line", "lora_weight": ["c"], "shuffle": True}
    )
    assert (options.dit, options.vae, options.steps, options.rate) == (Path("line"), Path("file"), 7, 1e-4)
    assert options.lora_weight == [Path("c")] and options.shuffle is True


def test_text_becomes_values() -> None:
    options = resolve(
        Everything,
        FILES | {"steps": "7", "rate": "1e-3", "image_size": ["64", "32"], "warmup": "0.5", "dtype": "fp32"},
    )
    assert (options.steps, options.rate, options.image_size) == (7, 1e-3, (64, 32))
    assert (options.warmup, options.dtype) == (0.5, "float32")
    assert resolve(Everything, FILES | {"warmup": "100"}).warmup == 100


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": "x"}, "--steps: must be a whole number, not 'x'."),
        ({"steps": "0"}, "--steps: must be at least 1, not 0."),
        ({"steps": "101"}, "--steps: must be at most 100, not 101."),
        ({"rate": "0"}, "--rate: must be more than 0, not 0."),
        ({"rate": "nan"}, "--rate: must be a number, not 'nan'."),
        ({"image_size": ["64"]}, "--image-size: must be 2 values, each a whole number, not '64'."),
        (
            {"image_size": ["1", "2", "3"]},
            "--image-size: must be 2 values, each a whole number, not '1 2 3'.",
        ),
        ({"lora_multiplier": ["1", "x"]}, "--lora-multiplier: must be a list, each a number, not '1 x'."),
        ({"attn_mode": "flsh"}, "--attn-mode: must be one of sdpa, flash, not 'flsh'. Did you mean flash?"),
        ({"warmup": "x"}, "--warmup: must be a whole number or a number, not 'x'."),
        ({"device": "gpu"}, "--device: must be auto, cpu, cuda or cuda:N (the GPU's number), not 'gpu'."),
        ({"seed": "-1"}, "--seed: must be at least 0, not -1."),
    ],
)
def test_one_line_names_the_flag(given: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(Everything, FILES | given)
    assert str(caught.value) == message


def test_a_pattern_is_told_in_words() -> None:
    class Named(Options):
        """Named"""

        name: str = option("A name.", pattern="^[a-z]+$", form="small letters")

    with pytest.raises(UserError, match=r"^--name: must be small letters, not 'A/b'.$"):
        resolve(Named, {"name": "A/b"})


def test_all_faults_are_shown_at_once() -> None:
    with pytest.raises(UserError) as caught:
        resolve(Everything, {"steps": "x", "rate": "-1"})
    assert str(caught.value).splitlines() == [
        "--vae and --dit must be given.",
        "--steps: must be a whole number, not 'x'.",
        "--rate: must be more than 0, not -1.",
    ]


def test_a_fault_in_the_file_names_the_file_and_its_key(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text('[model]\nfp8 = true\nlora_multiplier = ["x"]\nsteps = 7.5\nprompt = 3\n')
    with pytest.raises(UserError) as caught:
        resolve(Everything, FILES | {"config_file": str(path)})
    assert str(caught.value).splitlines() == [
        f"{path}: prompt: must be text, not '3'.",
        f"{path}: lora_multiplier: must be a list, each a number, not 'x'.",
        f"{path}: steps: must be a whole number, not '7.5'.",
    ]


def test_a_rule_between_options_speaks_in_its_own_words() -> None:
    class Pair(Options):
        """Pair"""

        low: int = option("Low.", default=0)
        high: int = option("High.", default=1)

        @model_validator(mode="after")
        def _ordered(self) -> "Pair":
            if self.low > self.high:
                raise ValueError("--low must not be over --high.")
            return self

    with pytest.raises(UserError, match="^--low must not be over --high.$"):
        resolve(Pair, {"low": "5"})


@pytest.mark.parametrize(
    ("name", "taken"), [("me/styles", True), ("s/s.s", True), ("styles", False), ("a/b c", False)]
)
def test_names_of_repositories(name: str, taken: bool) -> None:
    paths = {field: "x" for field in ("dit", "dataset_config", "output_dir", "output_name")}
    given = {**paths, "huggingface_repo_id": name}
    if taken:
        assert resolve(Train, given).huggingface_repo_id == name
    else:
        with pytest.raises(UserError, match=f"must be OWNER/NAME, not '{name}'"):
            resolve(Train, given)
