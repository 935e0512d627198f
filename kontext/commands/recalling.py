"""`kontext generate --from-image`: the options that made a picture, read back from it."""

from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from kontext.console import notice, say
from kontext.errors import UserError
from kontext.generation.formats import read_settings
from kontext.generation.parts import Loras
from kontext.options.base import flag_name
from kontext.options.generate import Generate
from kontext.options.shared import WEIGHTS

WEIGHT_OPTIONS = tuple(name for form in WEIGHTS for name in form)
RUN_OPTIONS = (
    "dtype", "vae_dtype", "vae_tiling", *WEIGHT_OPTIONS, "t5_max_length", "fp8_t5", "attn_mode", "split_attn",
    "lora_attach", "compile", "step_cache",
)  # fmt: skip
"""Options of a whole run that change its pictures; noted where they are not the default."""
LISTS = ("include_patterns", "exclude_patterns")
"""The same, of several texts: one on each line."""


def run_settings(options: Generate, loras: Loras) -> dict[str, str]:
    """The values of RUN_OPTIONS and LISTS that are not the default, as text. `loras`: as they are used."""
    values = {name: getattr(options, name) for name in RUN_OPTIONS}
    values["lora_attach"] = bool(loras.paths) and loras.attach
    found = {
        name: str(value).lower()
        for name, value in values.items()
        if value != Generate.model_fields[name].default
    }
    return found | {name: "\n".join(getattr(options, name)) for name in LISTS if getattr(options, name)}


READ: dict[str, Callable[[str], object]] = {
    **dict.fromkeys(
        ("prompt", "negative_prompt", "infer_steps", "embedded_cfg_scale", "true_cfg_scale", "flow_shift", "sampler",
         "schedule", "noise_layout", "no_resize_control", "control_resize", "control_placement", "stitch", "restore_size", "mask",
         "mask_blur", "strength", *RUN_OPTIONS),
        str,
    ),
    **dict.fromkeys(("control_image", *LISTS), str.splitlines),
    "lora_multiplier": str.split,
}  # fmt: skip
"""Settings that are options of the same name, and how their text is read."""


def recall(options: Generate, path: Path) -> Generate:
    """The options with what the picture's settings add; what the user gave wins.

    Raises UserError for settings that are missing or that no option accepts, and for a LoRA that must be given.
    """
    settings = read_settings(path)
    values = {name: read(settings[name]) for name, read in READ.items() if name in settings}
    values |= {"seed": settings["seeds"], "image_size": (settings["height"], settings["width"])}
    given = {name: getattr(options, name) for name in options.model_fields_set}
    if given.keys() & set(WEIGHT_OPTIONS):  # another form of the weights takes the place of the picture's
        values = {name: value for name, value in values.items() if name not in WEIGHT_OPTIONS}
    _compare_models(options, settings, path)
    try:
        recalled = Generate(**(values | given))
    except ValidationError as error:
        fault = error.errors()[0]
        if not fault["loc"]:
            raise UserError(
                f"{path}: its settings do not go together ({fault['msg']}); they were changed after the picture was made."
            ) from None
        name = str(fault["loc"][0])
        raise UserError(
            f"{path}: its setting for {flag_name(name)}, {values.get(name)!r}, is not valid ({fault['msg']}); it was "
            f"changed after the picture was made. Give {flag_name(name)} yourself."
        ) from None
    say(f"Settings from {path}: {', '.join(sorted(values.keys() - given.keys()))}.")
    return recalled


def _compare_models(options: Generate, settings: dict[str, str], path: Path) -> None:
    loras = settings.get("lora_weight", "").split("\n") if settings.get("lora_weight") else []
    if loras and not options.lora_weight:
        raise UserError(f"{path}: was made with the LoRA {', '.join(loras)}; give it with --lora-weight.")
    if options.lora_weight and [file.name for file in options.lora_weight] != loras:
        notice(f"{path} was made with {', '.join(loras) or 'no LoRA'}; the picture will differ.")
    if options.dit is not None and settings.get("dit", options.dit.name) != options.dit.name:
        notice(f"{path} was made with {settings['dit']}, not {options.dit.name}; the picture may differ.")
