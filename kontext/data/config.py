"""The dataset file: `[general]` and `[[datasets]]`, in TOML or JSON, as musubi-tuner reads it, and `[[validation]]`.

A key of `[general]` holds for every block that does not give it itself. `[[validation]]` blocks have the keys of
`[[datasets]]`; what they list is never trained on. Paths are relative to the working
directory, not to the file, as in musubi-tuner. Files written for musubi-tuner mean the same here; only what it has
no usable default for has another one: `caption_extension` (".txt", it has none) and a missing `resolution`
(1024x1024 in buckets; it takes one bucket of 960x544).
"""

import difflib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from kontext import console
from kontext.data.buckets import SizeRules, whole_tokens
from kontext.data.captions import CaptionKeys
from kontext.data.images import Size
from kontext.errors import UserError

DEFAULT_RESOLUTION = (1024, 1024)

RENAMED = {
    "flux_kontext_no_resize_control": "no_resize_control",
    "qwen_image_edit_no_resize_control": "no_resize_control",
    "qwen_image_edit_control_resolution": "control_resolution",
}
FRAMEPACK = ("fp_latent_window_size", "fp_1f_clean_indices", "fp_1f_target_index", "fp_1f_no_post")
VIDEO = (
    "video_directory",
    "video_jsonl_file",
    "target_frames",
    "frame_extraction",
    "frame_stride",
    "frame_sample",
    "max_frames",
    "source_fps",
)


class General(CaptionKeys):
    """Keys that may stand in `[general]` and in each block."""

    resolution: Size = Field(
        DEFAULT_RESOLUTION, description="Size of the targets in pixels: n or [width, height]."
    )
    enable_bucket: bool = Field(
        False, description="Sort the targets into sizes of about this area by aspect ratio."
    )
    bucket_no_upscale: bool = Field(False, description="With buckets: never enlarge a picture.")
    batch_size: int = Field(1, ge=1, description="Items per batch.")
    num_repeats: int = Field(1, ge=1, description="How often an item comes in one epoch.")
    no_resize_control: bool = Field(False, description="References keep their own size, in whole tokens.")
    control_dropout_rate: float = Field(
        0.0, ge=0, le=1, description="Share of batches that are shown without their references."
    )
    alpha_mask: bool = Field(
        False, description="The targets' alpha channel is their loss mask; it is not laid on white."
    )
    control_resolution: Size | None = Field(None, description="Area of the references: n or [width, height].")

    @field_validator("resolution", "control_resolution", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        """One number means a square."""
        return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("resolution", "control_resolution")
    @classmethod
    def _large_enough(cls, value: Size | None) -> Size | None:
        if value is not None and min(value) < 16:
            raise ValueError(f"{value[0]}x{value[1]} is too small, 16 pixels are the least")
        return value

    @field_validator("caption_extension", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("caption_extension")
    @classmethod
    def _dotted(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """`txt` means `.txt`, while `_caption.txt` is an ending of its own."""
        return tuple(ending if "." in ending else f".{ending}" for ending in value)


class Dataset(General):
    """One block of `[[datasets]]`: one source of items, with everything `[general]` gives filled in."""

    image_directory: Path | None = Field(None, description="Folder of the targets (not searched deeper).")
    image_jsonl_file: Path | None = Field(
        None, description="One JSON object per line with image_path and caption."
    )
    control_directory: Path | None = Field(
        None, description="Folder of the references, named after their targets."
    )
    mask_directory: Path | None = Field(
        None, description="Folder of the loss masks, named and sized as their targets; white counts."
    )
    cache_directory: Path | None = Field(
        None, description="Where caches are kept; default: the image_directory."
    )
    multiple_target: bool = Field(False, description="For other models; only false is possible.")

    @property
    def source(self) -> Path:
        """The folder or file that lists the items."""
        source = self.image_directory or self.image_jsonl_file
        assert source is not None, "checked when the file was read"
        return source

    @property
    def cache_folder(self) -> Path:
        """Where this block's cache files are."""
        return self.cache_directory or self.source

    @property
    def size_rules(self) -> SizeRules:
        """How the pictures of this block are sized."""
        return SizeRules(
            resolution=self.resolution,
            enable_bucket=self.enable_bucket,
            no_upscale=self.bucket_no_upscale,
            no_resize_control=self.no_resize_control,
            control_resolution=self.control_resolution,
        )


@dataclass(frozen=True)
class DatasetFile:
    """The blocks of a dataset file: those to train on, and those to validate with."""

    training: tuple[Dataset, ...]
    validation: tuple[Dataset, ...]


def load_datasets(path: Path) -> tuple[Dataset, ...]:
    """The blocks to train on. Raises UserError as `read_dataset_file`."""
    return read_dataset_file(path).training


def read_dataset_file(path: Path, *, tell: bool = False) -> DatasetFile:
    """Read a dataset file. tell: say what happens to pictures where a user may not expect it.

    Raises UserError that names the file, the block and the key.
    """
    tables = _parse(path)
    _check_names(tables, ("general", "datasets", "validation"), f"{path}:", "table")
    general, blocks = tables.get("general", {}), tables.get("datasets", [])
    validation = tables.get("validation", [])
    if not isinstance(general, dict) or not isinstance(blocks, list) or not isinstance(validation, list):
        raise UserError(
            f"{path}: write [general] in single, [[datasets]] and [[validation]] in double brackets."
        )
    if not blocks:
        raise UserError(
            f"{path}: there is no dataset in it. Add a [[datasets]] block with an image_directory."
        )
    general = _known_keys(general, General, f"{path}, [general]:")
    placed = _placed(path, "datasets", blocks), _placed(path, "validation", validation)
    found = [[(place, _block(block, general, f"{place}:")) for place, block in part] for part in placed]
    _check_cache_folders(path, found[0] + found[1])
    for place, dataset in (found[0] + found[1]) * tell:
        _tell_rounding(dataset, f"{place}:")
    return DatasetFile(*(tuple(dataset for _, dataset in part) for part in found))


def _placed(path: Path, name: str, blocks: list[Any]) -> list[tuple[str, Any]]:
    """Each block of a table with what to call it in a message."""
    several = len(blocks) > 1
    return [
        (f"{path}, [[{name}]]" + f" number {number}" * several, block)
        for number, block in enumerate(blocks, 1)
    ]


def _parse(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"{path}: no such dataset file.")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; the dataset file (.toml or .json) was expected.")
    if path.suffix.lower() not in (".toml", ".json"):
        raise UserError(f"{path}: a dataset file ends in .toml or .json.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        tables = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}.") from error
    if not isinstance(tables, dict):
        raise UserError(f"{path}: an object with the key datasets was expected.")
    return tables


def _block(block: Any, general: Mapping[str, Any], place: str) -> Dataset:
    if not isinstance(block, dict):
        raise UserError(f"{place} a table of keys was expected.")
    merged = {**general, **_known_keys(block, Dataset, place)}
    if "resolution" not in merged:
        merged.setdefault("enable_bucket", True)
    try:
        dataset = Dataset(**merged)
    except ValidationError as error:
        raise UserError(f"{place} {_first_problem(error)}.") from error
    _check_sources(dataset, place)
    return dataset


def _known_keys(table: Mapping[str, Any], model: type[General], place: str) -> dict[str, Any]:
    """The table with old names replaced. Raises UserError for keys that mean nothing here."""
    keys = {}
    for name, value in table.items():
        if name in FRAMEPACK:
            raise UserError(
                f"{place} {name} belongs to FramePack. FLUX.1 Kontext has no such thing: take it out."
            )
        if name in VIDEO:
            raise UserError(
                f"{place} {name} belongs to video models. FLUX.1 Kontext is trained on pictures alone."
            )
        if name in RENAMED:
            console.notice(f"{place} {name} is the old name of {RENAMED[name]}.")
        keys[RENAMED.get(name, name)] = value
    if model is General:
        for name in keys.keys() & (Dataset.model_fields.keys() - General.model_fields.keys()):
            raise UserError(f"{place} {name} belongs into a [[datasets]] block.")
    _check_names(keys, tuple(model.model_fields), place, "key")
    return keys


def _check_names(names: Mapping[str, Any], known: tuple[str, ...], place: str, kind: str) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(known)}."
            raise UserError(f"{place} unknown {kind} {name}. {hint}")


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    field = str(problem["loc"][0])
    message = problem["msg"].removeprefix("Value error, ")
    return f"{field} = {problem['input']!r}: {message[0].lower()}{message[1:]}"


def _check_sources(dataset: Dataset, place: str) -> None:
    folder, jsonl = dataset.image_directory, dataset.image_jsonl_file
    if (folder is None) == (jsonl is None):
        raise UserError(f"{place} give either image_directory or image_jsonl_file.")
    if dataset.multiple_target:
        raise UserError(f"{place} multiple_target is for other models; take it out.")
    if jsonl is not None and dataset.cache_directory is None:
        raise UserError(f"{place} image_jsonl_file needs a cache_directory.")
    if jsonl is not None and dataset.control_directory is not None:
        raise UserError(f"{place} with image_jsonl_file, references are named in its lines (control_path).")
    _check_masks(dataset, place)
    for name in ("image_directory", "control_directory", "mask_directory"):
        path = getattr(dataset, name)
        if path is not None and not path.is_dir():
            raise UserError(f"{place} {name} {_absent(path, 'folder')}")
    if jsonl is not None and not jsonl.is_file():
        raise UserError(f"{place} image_jsonl_file {_absent(jsonl, 'file')}")
    if folder and dataset.control_directory and folder.resolve() == dataset.control_directory.resolve():
        raise UserError(
            f"{place} control_directory is the image_directory: each target would be its own reference."
        )


def _check_masks(dataset: Dataset, place: str) -> None:
    folder = dataset.mask_directory
    if folder is None:
        return
    if dataset.alpha_mask:
        raise UserError(f"{place} mask_directory and alpha_mask exclude each other; leave one out.")
    if dataset.image_directory is None:
        raise UserError(f"{place} with image_jsonl_file, loss masks are named in its lines (mask_path).")
    if folder.resolve() == dataset.image_directory.resolve():
        raise UserError(f"{place} mask_directory is the image_directory; masks need a folder of their own.")


def _absent(path: Path, kind: str) -> str:
    if path.exists():
        return f"{path} is not a {kind}."
    return f"{path} does not exist. Paths are relative to the working directory, {Path.cwd()}."


def _tell_rounding(dataset: Dataset, place: str) -> None:
    if dataset.enable_bucket:
        return
    size = whole_tokens(dataset.resolution)
    if size != dataset.resolution:
        width, height = dataset.resolution
        console.notice(
            f"{place} resolution {width}x{height} is rounded down to {size[0]}x{size[1]} (steps of 16)."
        )
    if "enable_bucket" not in dataset.model_fields_set:
        console.notice(
            f"{place} enable_bucket is not given, so every target is cropped to {size[0]}x{size[1]}. "
            "Set it to true to keep aspect ratios."
        )


def _check_cache_folders(path: Path, placed: list[tuple[str, Dataset]]) -> None:
    seen: dict[Path, str] = {}
    for place, dataset in placed:
        name = place.removeprefix(f"{path}, ")
        folder = dataset.cache_folder.resolve()
        if folder in seen:
            raise UserError(
                f"{path}: {seen[folder]} and {name} would both keep their caches in "
                f"{dataset.cache_folder}. Give each its own cache_directory."
            )
        seen[folder] = name
