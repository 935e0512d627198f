"""The words that set something of one picture, in prompt lines, prompt files and interactively."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kontext.flow import LEVELS
from kontext.lora.strength import Strength, parse_strength
from kontext.sampler import SAMPLERS


@dataclass(frozen=True)
class Word:
    """What a word sets: a field of Request, how its text is read, and what it expects. A flag may stand alone."""

    field: str
    read: Callable[[str], object]
    expects: str
    repeatable: bool = False
    flag: bool = False


def _within(smallest: float, kind: type, largest: float = float("inf")) -> Callable[[str], object]:
    def read(text: str) -> object:
        value = kind(text)
        if not smallest <= value <= largest or value == float("inf"):
            raise ValueError(text)
        return value

    return read


def _path(text: str) -> Path:
    if not text:
        raise ValueError(text)
    return Path(text)


def _strengths(text: str) -> tuple[Strength, ...]:
    """Numbers with commas or spaces between; one with factors of blocks, which has commas itself, needs spaces."""
    parts = [part for word in text.split() for part in ([word] if ":" in word else word.split(","))]
    strengths = tuple(parse_strength(part) for part in parts if part)
    if not strengths:
        raise ValueError(text)
    return strengths


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise ValueError(text)
    return value


def _choice(field: str, values: dict[str, object]) -> Word:
    def read(text: str) -> object:
        if text not in values:
            raise ValueError(text)
        return values[text]

    *others, last = values
    return Word(field, read, f"{', '.join(others)} or {last}")


def _flag(field: str, *, on: bool = True) -> Word:
    def read(text: str) -> bool:
        if text not in ("", "true", "false"):
            raise ValueError(text)
        return (text != "false") is on

    return Word(field, read, "no value, true or false", flag=True)


def _names(*names: str) -> dict[str, object]:
    return {name: name for name in names}


WORDS: dict[str, Word] = {
    "w": Word("width", _within(1, int), "a width in pixels"),
    "h": Word("height", _within(1, int), "a height in pixels"),
    "d": Word("seed", _within(0, int), "a seed (a whole number)"),
    "s": Word("steps", _within(1, int), "a number of steps"),
    "g": Word("guidance", _within(0, float), "a guidance scale"),
    "fs": Word("flow_shift", _within(0, float), "a flow shift (0: by resolution)"),
    "l": Word("true_cfg_scale", _within(1, float), "a true guidance scale"),
    "n": Word("negative_prompt", str, "a negative prompt"),
    "ci": Word("references", _path, "a path to a reference image", repeatable=True),
    "m": Word(
        "multipliers", _strengths, "one strength per LoRA, such as 0.8 or 1.0:double=0.5,single3-10=0.8"
    ),
    "sampler": _choice("sampler", _names(*SAMPLERS)),
    "schedule": _choice("schedule", _names(*LEVELS)),
    "noise_layout": _choice("noise_layout", _names("latent", "packed")),
    "mask": Word("mask", _path, "a path to a mask"),
    "mask_blur": Word("mask_blur", _within(0, float, 1000), "a blur in pixels, at most 1000"),
    "strength": Word("strength", _share, "a number over 0, at most 1"),
    "control_resize": _choice("crop_references", {"stretch": False, "crop": True}),
    "no_resize_control": _flag("resize_references", on=False),
    "control_placement": _choice("placement", _names("offset", "index")),
    "stitch": _flag("stitch"),
    "restore_size": _flag("restore_size"),
}
"""By letter, or by name where there is no letter."""

LETTERS = {
    "width": "w",
    "height": "h",
    "seed": "d",
    "infer_steps": "s",
    "embedded_cfg_scale": "g",
    "flow_shift": "fs",
    "true_cfg_scale": "l",
    "negative_prompt": "n",
    "control_image": "ci",
    "lora_multiplier": "m",
}
"""The names of options that have a letter too."""

OTHER_NAMES = {
    "sample_steps": "s",
    "guidance_scale": "g",
    "discrete_flow_shift": "fs",
    "cfg_scale": "l",
    "control_image_path": "ci",
}
"""What musubi-tuner calls these in its files of sample prompts."""


def word_key(name: str) -> str | None:
    """The key in WORDS of a letter or an option's name, in any spelling; None for an unknown one."""
    name = name.lower().replace("-", "_")
    key = (LETTERS | OTHER_NAMES).get(name, name)
    return key if key in WORDS else None
