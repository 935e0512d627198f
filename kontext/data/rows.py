"""The lines of a JSONL file: a target with its caption, and where its references and its loss mask are."""

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kontext.errors import UserError

KNOWN = ("image_path", "caption", "control_path", "mask_path")


@dataclass(frozen=True)
class Row:
    """One line. captions: none when it does not say. controls, masks: None when it does not, () for none."""

    number: int
    image: Path
    captions: tuple[str, ...]
    controls: tuple[Path, ...] | None
    masks: tuple[Path, ...] | None

    @property
    def mask(self) -> Path | None:
        return self.masks[0] if self.masks else None


def read_rows(path: Path) -> tuple[Row, ...]:
    """All lines of a file. Raises UserError that names the line for what means nothing here."""
    rows = tuple(_read(path))
    _check_all_say(path, rows, "control_path", [row.controls for row in rows])
    _check_all_say(path, rows, "mask_path", [row.masks for row in rows])
    return rows


def _read(path: Path) -> Iterable[Row]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _row(f"{path}:{number}", number, line)


def _row(place: str, number: int, line: str) -> Row:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not a line of JSON ({error.msg}).") from error
    if not isinstance(values, dict):
        raise UserError(f"{place}: an object with image_path and caption was expected.")
    _check_keys(place, values)
    image = values.get("image_path", values.get("image_path_0"))
    caption = values.get("caption")
    captions = caption if isinstance(caption, list) else [] if caption is None else [caption]
    if not all(isinstance(text, str) for text in (image, *captions)):
        raise UserError(f"{place}: image_path and caption must be texts (caption may be a list of them).")
    return Row(
        number, Path(image), tuple(captions), _paths(place, values, "control_path"), _masks(place, values)
    )


def _check_keys(place: str, values: dict[str, Any]) -> None:
    """Columns of other tools may stay; a misspelt one of ours, which would be lost silently, may not."""
    for name in values:
        base = re.sub(r"_\d+$", "", name)
        near = difflib.get_close_matches(base, KNOWN, n=1, cutoff=0.8)
        if base not in KNOWN and near:
            raise UserError(f"{place}: unknown key {name}. Did you mean {near[0]}?")
        if base == "image_path" and name not in ("image_path", "image_path_0"):
            raise UserError(f"{place}: {name}: FLUX.1 Kontext learns one target per line.")


def _paths(place: str, values: dict[str, Any], base: str) -> tuple[Path, ...] | None:
    """`base` or `base_N` by ascending N; an explicit null means that there is none."""
    numbered = {}
    for name, value in values.items():
        match = re.fullmatch(rf"{base}(?:_(\d+))?", name)
        if match is None:
            continue
        if not isinstance(value, str | None) or value == "":
            raise UserError(f"{place}: {name} must be a path, or null for an item without one.")
        numbered[int(match[1] or 0)] = value
    if not numbered:
        return None
    return tuple(Path(value) for _, value in sorted(numbered.items()) if value is not None)


def _masks(place: str, values: dict[str, Any]) -> tuple[Path, ...] | None:
    masks = _paths(place, values, "mask_path")
    if masks and len(masks) > 1:
        raise UserError(f"{place}: a target has one loss mask; give one mask_path.")
    for mask in masks or ():
        if not mask.is_file():
            raise UserError(f"{place}: the loss mask {mask} does not exist.")
    return masks


def _check_all_say(
    path: Path, rows: Sequence[Row], name: str, said: Sequence[tuple[Path, ...] | None]
) -> None:
    silent = [row for row, paths in zip(rows, said, strict=True) if paths is None]
    if silent and len(silent) < len(rows) and any(said):
        lines = ", ".join(str(row.number) for row in silent[:5])
        raise UserError(
            f"{path}: no {name} in line {lines}{' and others' if len(silent) > 5 else ''}, while other lines "
            "have one. Add it, or write null for an item without one."
        )
