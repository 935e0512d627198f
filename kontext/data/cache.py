"""Cache files: one for the latents of an item, one for its text embeddings, in musubi-tuner's format.

    <key>_<W>x<H>_fk.safetensors        W, H: pixels of the upright target before resizing, four digits or more
        latents_1x<h>x<w>_<dtype>               (C, h, w)   scaled latents of the target
        latents_control_1x<h>x<w>_<dtype>       (C, h, w)   of the first reference
        latents_control_<i>_1x<h>x<w>_<dtype>   (C, h, w)   of the others, i from 1
        latents_mask_1x<h>x<w>_<dtype>          (1, h, w)   of our own, if there is a loss mask: weights in 0..1
    <key>_fk_te.safetensors
        t5_vec_<dtype>                          (T, D)
        clip_l_pooler_<dtype>                   (V,)
        t5_vec_<i>_<dtype>, clip_l_pooler_<i>_<dtype>   of further captions, i from 1

Metadata: `architecture`, `format_version`, `width` and `height` or `caption1` (`caption2` ... of further captions), and
of our own `kontext`: a `Record` in JSON that tells what the file was made from. Files without it (musubi-tuner's) are
read as well.
"""

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kontext.data.fingerprints import Stamp
from kontext.data.images import Size
from kontext.errors import UserError
from kontext.files import save_tensors

ARCHITECTURE = "flux_kontext"
FORMAT_VERSION = "1.0.1"
RECORD = "kontext"
ENDINGS = {"latents": "_fk.safetensors", "text": "_fk_te.safetensors"}
MASK = "latents_mask"
LEFTOVER_SECONDS = 3600
DTYPE = re.compile(r"_(float64|float32|bfloat16|float16|float8_e4m3fn|float8_e5m2)$")
SIZE = re.compile(r"_\d+x\d+x\d+$")

Kind = Literal["latents", "text"]


@dataclass(frozen=True)
class Record:
    """What a cache file was made from.

    dataset: hash of the block's source, by which a block knows its own files.
    encoder: hash of the encoders and their settings.
    sources: stamps of the target and its references; none for text. mask: that of the loss mask's file, if any.
    """

    dataset: str
    encoder: str
    sources: tuple[Stamp, ...] = ()
    mask: Stamp | None = None


@dataclass(frozen=True)
class Latents:
    """Scaled latents (C, h, w) of one item: target and references; weights (1, h, w) of the target's loss, if any."""

    target: Tensor
    references: tuple[Tensor, ...]
    mask: Tensor | None = None


@dataclass(frozen=True)
class Text:
    """Embeddings of one caption: txt (T, D) from T5, vector (V,) from CLIP."""

    txt: Tensor
    vector: Tensor


@dataclass(frozen=True)
class Header:
    """What a cache file says without its tensors being read.

    shapes: by logical name (`latents`, `latents_control`, `latents_control_1`, `t5_vec`, `clip_l_pooler`).
    captions: all that it has embeddings of. record: None in files of other programs.
    """

    shapes: Mapping[str, tuple[int, ...]]
    captions: tuple[str, ...]
    record: Record | None

    @property
    def references(self) -> tuple[str, ...]:
        """Logical names of the references, in order."""
        return _references(self.shapes)


def _references(names: Iterable[str]) -> tuple[str, ...]:
    found = [name for name in names if name.startswith("latents_control")]
    return tuple(sorted(found, key=lambda name: int(name.removeprefix("latents_control")[1:] or 0)))


def latents_path(folder: Path, key: str, size: Size) -> Path:
    """The file of an item's latents; `size` is that of the upright target picture."""
    return folder / f"{key}_{size[0]:04d}x{size[1]:04d}{ENDINGS['latents']}"


def text_path(folder: Path, key: str) -> Path:
    """The file of an item's text embeddings."""
    return folder / f"{key}{ENDINGS['text']}"


def key_of(path: Path) -> str:
    """The key of the item that a cache file belongs to."""
    if path.name.endswith(ENDINGS["text"]):
        return path.name.removesuffix(ENDINGS["text"])
    return path.name.removesuffix(ENDINGS["latents"]).rpartition("_")[0]


def write_latents(path: Path, latents: Latents, *, size: Size, record: Record, source: str) -> None:
    """Write atomically. Raises UserError when a value is not finite, or the file cannot be written.

    source: what the user knows the item by, for the message.
    """
    tensors = {_latents_name("latents", latents.target): latents.target}
    for index, reference in enumerate(latents.references):
        name = f"latents_control_{index}" if index else "latents_control"
        tensors[_latents_name(name, reference)] = reference
    if latents.mask is not None:
        tensors[_latents_name(MASK, latents.mask)] = latents.mask
    _check_finite(tensors, source)
    _save(path, tensors, {"width": str(size[0]), "height": str(size[1])}, record)


def write_text(path: Path, texts: Mapping[str, Text], *, record: Record, source: str) -> None:
    """As `write_latents`, of embeddings by caption."""
    tensors = {}
    for index, text in enumerate(texts.values()):
        for name, tensor in zip(_text_names(index), (text.txt, text.vector), strict=True):
            tensors[f"{name}_{_dtype_name(tensor)}"] = tensor
    _check_finite(tensors, source)
    _save(path, tensors, {f"caption{number}": caption for number, caption in enumerate(texts, 1)}, record)


def _text_names(index: int) -> tuple[str, str]:
    """Logical names of the embeddings of caption `index`, from T5 and from CLIP."""
    end = f"_{index}" if index else ""
    return f"t5_vec{end}", f"clip_l_pooler{end}"


def _save(path: Path, tensors: Mapping[str, Tensor], extra: Mapping[str, str], record: Record) -> None:
    metadata = {"architecture": ARCHITECTURE, "format_version": FORMAT_VERSION, **extra}
    own = {name: tensor.clone() for name, tensor in tensors.items()}  # a picture may be its own reference
    save_tensors(path, own, {**metadata, RECORD: json.dumps(asdict(record))})


def _check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{source}: its {logical_name(name)} contain NaN or infinity and were not cached. "
                "Encode in a wider precision (float32), or check the weights."
            )


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _latents_name(name: str, tensor: Tensor) -> str:
    return f"{name}_1x{tensor.shape[-2]}x{tensor.shape[-1]}_{_dtype_name(tensor)}"


def logical_name(key: str) -> str:
    """A key without its dtype and, for latents, without its size: `latents_1x8x8_float32` -> `latents`."""
    name = DTYPE.sub("", key)
    return SIZE.sub("", name) if name.startswith("latents_") else name


def read_header(path: Path) -> Header | None:
    """What is in a cache file; None when it is damaged, cut short or something else. The file must exist."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            keys = list(file.keys())
            shapes = {logical_name(key): tuple(file.get_slice(key).get_shape()) for key in keys}
    except (SafetensorError, OSError):
        return None
    if metadata.get("architecture") != ARCHITECTURE:
        return None
    return Header(shapes, _captions(metadata), _parse_record(metadata.get(RECORD)))


def _captions(metadata: Mapping[str, str]) -> tuple[str, ...]:
    numbered = (metadata.get(f"caption{number}") for number in count(1))
    return tuple(takewhile(lambda caption: caption is not None, numbered))


def _parse_record(text: str | None) -> Record | None:
    try:
        values: dict[str, Any] = json.loads(text or "")
        sources = tuple(Stamp(**stamp) for stamp in values["sources"])
        mask = values.get("mask")
        return Record(values["dataset"], values["encoder"], sources, mask and Stamp(**mask))
    except (ValueError, TypeError, KeyError):
        return None


def read_latents(path: Path) -> Latents:
    """The tensors of a latents file. Raises UserError when it cannot be read."""
    with _opened(path) as file:
        tensors = {logical_name(key): file.get_tensor(key) for key in list(file.keys())}
        references = tuple(tensors[name] for name in _references(tensors))
        return Latents(tensors["latents"], references, tensors.get(MASK))


def read_text(path: Path, caption: str | None = None) -> Text:
    """The embeddings of a caption, else of the first. Raises UserError when they cannot be read."""
    with _opened(path) as file:
        index = 0 if caption is None else _captions(file.metadata() or {}).index(caption)
        keys = {logical_name(key): key for key in list(file.keys())}
        txt, vector = (file.get_tensor(keys[name]) for name in _text_names(index))
        return Text(txt, vector)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{path}: this cache file is missing or damaged; run the cache commands again."
        ) from error


def delete_stale(
    folder: Path, kind: Kind, *, dataset: str, keep: Iterable[Path], keep_keys: Iterable[str] = ()
) -> list[Path]:
    """Delete the cache files of items that are no longer listed, and tell which.

    keep: the files of the items; keep_keys: keys of items whose file names cannot be told.

    Only files that this program wrote for this block (`Record.dataset`) are touched: a cache folder is often the
    picture folder, and other dataset files may cache there too. Temporary files of runs that were killed go as well.
    """
    kept, kept_keys = {path.name for path in keep}, set(keep_keys)
    stale = []
    for path in sorted(folder.glob(f"*{ENDINGS[kind]}")):
        header = None if path.name in kept or key_of(path) in kept_keys else read_header(path)
        if header and header.record and header.record.dataset == dataset:
            path.unlink(missing_ok=True)
            stale.append(path)
    for path in folder.glob(".kontext-*.tmp"):
        if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
            path.unlink(missing_ok=True)
    return stale
