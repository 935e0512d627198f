"""Prompt files for sample pictures: .txt lines, .toml and .json, as musubi-tuner reads them."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kontext import console
from kontext.errors import UserError
from kontext.generation.prompt_files import from_table
from kontext.generation.prompts import parse_line
from kontext.generation.request import Request

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
    subsets = shared.pop("subset", []) if isinstance(shared, dict) else None
    if (
        set(document) - {"prompt"}
        or not isinstance(subsets, list)
        or not all(isinstance(s, dict) for s in subsets)
    ):
        raise UserError(f"--sample-prompts {path}: expected a table [prompt] with entries [[prompt.subset]].")
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
    others = {*OTHER_MODELS.values(), "enum"}
    return from_table({key: value for key, value in entry.items() if key not in others}, base, where)
