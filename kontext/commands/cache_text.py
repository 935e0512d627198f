"""`kontext cache-text`: captions of a dataset to text embeddings on disk."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kontext import console
from kontext.checkpoints import (
    Source,
    load_clip,
    load_clip_tokenizer,
    load_t5,
    load_t5_tokenizer,
    open_source,
)
from kontext.commands.caching import Done, find_work, finish
from kontext.data.encode import encode_texts
from kontext.data.fingerprints import weights_fingerprint
from kontext.data.items import Skips
from kontext.device import resolve_device, told_precision
from kontext.model.text import encode_clip, encode_t5
from kontext.options.base import need
from kontext.options.cache import CacheText
from kontext.processes import Processes, joined

PROBE = "Make the sky RED, and 3 cats' fur naïve -- 森 🐈"
"""A text whose tokens tell tokenizers apart that have the same vocabulary."""


@dataclass(frozen=True)
class Tokenizers:
    """Those of both encoders."""

    t5: Any
    clip: Any


def run(options: CacheText) -> None:
    """Do what the options ask for, together with the other processes of the launch."""
    with joined() as crew:
        _fill(options, crew)


def _fill(options: CacheText, crew: Processes) -> None:
    need(options, "text_encoder1", "text_encoder2", because="to encode captions")
    t5, clip = open_source(options.text_encoder1, "T5"), open_source(options.text_encoder2, "CLIP")
    tokenizers = Tokenizers(
        load_t5_tokenizer(options.tokenizer1, options.text_encoder1),
        load_clip_tokenizer(options.tokenizer2, options.text_encoder2),
    )
    encoder = crew.first(lambda: _fingerprint(t5, clip, tokenizers, options))
    done = Done(Skips(options.strict))
    work = find_work(
        options.dataset_config,
        "text",
        done.skips,
        crew,
        encoder=encoder,
        skip_existing=options.skip_existing,
    )
    if work.mine:
        encode = _encoder(options, tokenizers)
        with console.progress("Text embeddings", total=len(work.mine), unit="item") as bar:
            for entry in encode_texts(work.mine, encode, encoder=encoder, batch_size=options.batch_size):
                done.written.append(entry)
                bar.advance()
    finish(work, done, crew, keep_cache=options.keep_cache)


def _fingerprint(t5: Source, clip: Source, tokenizers: Tokenizers, options: CacheText) -> str:
    settings = {
        "dtype": options.dtype,
        "length": options.t5_max_length,
        "fp8": options.fp8_t5,
        "config": [t5.config, clip.config],
        "tokenizers": [_describe(tokenizers.t5), _describe(tokenizers.clip)],
    }
    return weights_fingerprint((*t5.files, *clip.files), json.dumps(settings, sort_keys=True))


def _describe(tokenizer: Any) -> list[Any]:
    """What a tokenizer does, whatever files it was read from."""
    return [sorted(tokenizer.get_vocab().items()), tokenizer(PROBE).input_ids]


def _encoder(options: CacheText, tokenizers: Tokenizers) -> Callable[[list[str]], tuple[Tensor, Tensor]]:
    device = resolve_device(options.device)
    precision = told_precision(options.dtype, device)
    where = {"device": device, "dtype": precision.computing}
    t5 = load_t5(options.text_encoder1, kept=precision.kept, fp8=options.fp8_t5, **where)
    clip = load_clip(options.text_encoder2, **where)

    def encode(captions: list[str]) -> tuple[Tensor, Tensor]:
        txt = encode_t5(t5, tokenizers.t5, captions, max_length=options.t5_max_length)
        vector = encode_clip(clip, tokenizers.clip, captions)
        return txt.to(precision.kept), vector.to(precision.kept)  # files are the same from every machine

    return encode
