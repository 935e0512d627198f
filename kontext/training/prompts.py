"""Prompt files for sample pictures: .txt lines, .toml and .json, as musubi-tuner reads them."""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kontext import console
from kontext.errors import UserError
from kontext.generation.prompts import parse_line
from kontext.generation.request import Request

# Keys of TOML and JSON files: the field of Request and the types a value may have.
KEYS: dict[str, tuple[str, type | tuple[type, ...]]] = {
    "prompt": ("prompt", str),
    "width": ("width", int),
    "height": ("height", int),
    "seed": ("seed", int),
    "sample_steps": ("steps", int),
    "guidance_scale": ("guidance", (int, float)),
    "discrete_flow_shift": ("flow_shift", (int, float)),
    "cfg_scale": ("true_cfg_scale", (int, float)),
    "negative_prompt": ("negative_prompt", str),
    "control_image_path": ("references", (str, list)),
}
# What such files may hold for other models, as line options and as keys.
OTHER_MODELS = {
    "f": "frame_count", "i": "image_path", "ei": "end_image_path", "cn": "control_video_path", "of": "one_frame",
}  # fmt: skip


def read_sample_prompts(path: Path, base: Request) -> list[Request]:
    """The samples of a prompt file, in order; what a sample leaves open is as in `base`.

    Raises UserError that names the file and the place for anything unreadable or unknown.
    """
    readers = {".txt": _read_text, ".toml": _read_toml, ".json": _read_json}
    if path.suffix.lower() not in readers:
        raise UserError(f"--sample-prompts {path}: the file must end in .txt, .toml or .json.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"--sample-prompts {path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError:
        raise UserError(f"--sample-prompts {path}: is not UTF-8 text.") from None
    samples = readers[path.suffix.lower()](text, base, path)
    if not samples:
        raise UserError(f"--sample-prompts {path}: there is no prompt in this file.")
    for sample in samples:
        for reference in sample.references:
            if isinstance(reference, Path) and not reference.is_file():
                raise UserError(f"--sample-prompts {path}: the reference {reference} does not exist.")
    return samples


def _read_text(text: str, base: Request, path: Path) -> list[Request]:
    lines = [(number, line.rstrip()) for number, line in enumerate(text.splitlines(), 1)]
    return [
        _line(line, base, f"{path}, line {number}")
        for number, line in lines
        if line.strip() and not line.startswith("#")
    ]


def _line(line: str, base: Request, where: str) -> Request:
    prompt, *pieces = line.split(" --")
    kept = [piece for piece in pieces if piece.split(" ")[0].lower() not in OTHER_MODELS]
    if len(kept) < len(pieces):
        console.notice(
            f"{where}: options of other models are left out: {' '.join(sorted(set(pieces) - set(kept)))}."
        )
    return parse_line(" --".join((prompt, *kept)), base, where)


def _read_toml(text: str, base: Request, path: Path) -> list[Request]:
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"--sample-prompts {path}: is not valid TOML: {error}.") from None
    shared = document.get("prompt", {})
    if set(document) - {"prompt"} or not isinstance(shared, dict):
        raise UserError(f"--sample-prompts {path}: expected a table [prompt] with entries [[prompt.subset]].")
    subsets = shared.pop("subset", [])
    samples = []
    for number, subset in enumerate(subsets, 1):
        where = f"{path}, subset {number}"
        if twice := set(shared) & set(subset):
            raise UserError(f"{where}: {', '.join(sorted(twice))} is given in [prompt] too.")
        samples.append(_entry({**shared, **subset}, base, where))
    return samples


def _read_json(text: str, base: Request, path: Path) -> list[Request]:
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--sample-prompts {path}: is not valid JSON: {error}.") from None
    if not isinstance(document, list):
        raise UserError(f"--sample-prompts {path}: expected a list of prompts.")
    return [_json_entry(entry, base, f"{path}, entry {number}") for number, entry in enumerate(document, 1)]


def _json_entry(entry: Any, base: Request, where: str) -> Request:
    if isinstance(entry, str):
        return _line(entry, base, where)
    if isinstance(entry, dict):
        return _entry(entry, base, where)
    raise UserError(f"{where}: a prompt is a string or an object.")


def _entry(entry: Mapping[str, Any], base: Request, where: str) -> Request:
    changes: dict[str, Any] = {}
    for key, value in entry.items():
        if key in (*OTHER_MODELS.values(), "enum"):
            continue
        if key not in KEYS:
            raise UserError(f"{where}: unknown key {key}; known are {', '.join(KEYS)}.")
        field, kind = KEYS[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{where}: {key} has the wrong type ({value!r}).")
        changes[field] = value
    if not changes.get("prompt", base.prompt):
        raise UserError(f"{where}: there is no prompt.")
    references = changes.get("references", [])
    changes["references"] = tuple(map(Path, [references] if isinstance(references, str) else references))
    return replace(base, **(changes | ({"flow_shift": None} if changes.get("flow_shift") == 0 else {})))
