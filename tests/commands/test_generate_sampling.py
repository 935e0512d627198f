"""`kontext generate` with other samplers and schedules."""

from typing import get_args

import pytest
from safetensors import safe_open

from kontext.flow import LEVELS
from kontext.options.generate import Generate
from kontext.sampler import SAMPLERS


def latent(generate, folder, name, *more):
    options = (
        "--prompt",
        "red",
        "--seed",
        1,
        "--output-type",
        "latent",
        "--output-name",
        name,
        "--infer-steps",
        4,  # with fewer, dpmpp_2m takes Euler's steps alone
    )
    code, said = generate(*options, *more)
    assert code == 0, said
    with safe_open(folder / "out" / f"{name}.safetensors", "pt") as file:
        return file.get_tensor("latent"), file.metadata()


def test_each_choice_gives_another_picture_and_is_noted(generate, tmp_path):
    plain, settings = latent(generate, tmp_path, "plain")
    assert not {"sampler", "schedule"} & settings.keys()
    for option, value in (
        ("sampler", "heun"),
        ("sampler", "dpmpp_2m"),
        ("schedule", "simple"),
        ("schedule", "beta"),
        ("noise_layout", "packed"),
    ):
        changed, settings = latent(generate, tmp_path, value, f"--{option.replace('_', '-')}", value)
        assert settings[option] == value and (changed - plain).abs().max() > 1e-3


@pytest.mark.parametrize("option, known", [("sampler", SAMPLERS), ("schedule", LEVELS)])
def test_the_options_name_what_exists(option, known):
    assert get_args(Generate.model_fields[option].annotation) == tuple(known)
