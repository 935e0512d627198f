"""The tokenizers of T5 and CLIP: from a folder, from beside the weights, or from the Hugging Face hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kontext.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class _Wanted:
    name: str
    flag: str
    hub: str
    folders: tuple[str, ...]  # where it may lie beside the weights
    files: tuple[tuple[str, ...], ...]  # any of these sets of files will do
    algorithm: str  # `model.type` in tokenizer.json


_T5 = _Wanted(
    "T5",
    "--tokenizer1",
    "google/t5-v1_1-xxl",
    ("tokenizer_2", "tokenizer1", "t5_tokenizer", "t5xxl_tokenizer", "tokenizer_t5", "tokenizers/t5", "t5"),
    (("tokenizer.json",), ("spiece.model",)),
    "Unigram",
)
_CLIP = _Wanted(
    "CLIP",
    "--tokenizer2",
    "openai/clip-vit-large-patch14",
    (
        "tokenizer",
        "tokenizer2",
        "clip_tokenizer",
        "clip_l_tokenizer",
        "tokenizer_clip",
        "tokenizers/clip",
        "clip",
    ),
    (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "BPE",
)


def load_t5_tokenizer(folder: Path | str | None, weights: Path | str) -> PreTrainedTokenizerBase:
    """T5's tokenizer from `folder`, else from a folder beside `weights`, else from the hub.

    Raises UserError when the folder holds another tokenizer or none, and when the hub cannot be reached.
    """
    from transformers import T5TokenizerFast

    return _load(T5TokenizerFast, _T5, folder, Path(weights))


def load_clip_tokenizer(folder: Path | str | None, weights: Path | str) -> PreTrainedTokenizerBase:
    """CLIP's tokenizer, found as in `load_t5_tokenizer`."""
    from transformers import CLIPTokenizerFast

    return _load(CLIPTokenizerFast, _CLIP, folder, Path(weights))


def _load(
    cls: type[PreTrainedTokenizerBase], wanted: _Wanted, folder: Path | str | None, weights: Path
) -> PreTrainedTokenizerBase:
    if folder is not None:
        found = Path(folder)
        if not found.is_dir():
            raise UserError(f"{wanted.flag}: there is no folder {found}.")
        if not _holds(found, wanted):
            raise UserError(f"{wanted.flag}: {found} holds no {wanted.name} tokenizer ({_needed(wanted)}).")
    else:
        found = _beside(weights, wanted)
    try:
        return cls.from_pretrained(found or wanted.hub)
    except Exception as error:  # the tokenizers library raises nothing narrower
        if found:
            raise UserError(f"The {wanted.name} tokenizer in {found} cannot be read: {error}") from error
        raise UserError(
            f"The {wanted.name} tokenizer is not beside {weights}, and cannot be fetched from "
            f"https://huggingface.co/{wanted.hub}. Download {_needed(wanted)} and tokenizer_config.json from "
            f"there into a folder and pass {wanted.flag} FOLDER."
        ) from error


def _needed(wanted: _Wanted) -> str:
    return " or ".join(" and ".join(names) for names in wanted.files)


def _beside(weights: Path, wanted: _Wanted) -> Path | None:
    """The first fitting folder: with the weights, or beside their folder as in a diffusers pipeline."""
    base = weights if weights.is_dir() else weights.parent
    places = [base, *(parent / name for parent in (base, base.parent) for name in wanted.folders)]
    return next((place for place in places if _holds(place, wanted)), None)


def _holds(folder: Path, wanted: _Wanted) -> bool:
    """Whether a folder holds this tokenizer, and not the other one."""
    description = folder / "tokenizer.json"
    if description.is_file():
        return _algorithm(description) == wanted.algorithm
    return any(all((folder / name).is_file() for name in names) for names in wanted.files)


def _algorithm(description: Path) -> str | None:
    try:
        return json.loads(description.read_text(encoding="utf-8"))["model"]["type"]
    except (ValueError, KeyError, TypeError):
        return None
