"""Tokenizers of the small world, in the file layouts of T5 and CLIP.

Every word of `WORDS` is one token; any other text still comes through, letter by letter (T5, which tells upper
from lower case) or in pieces and bytes (CLIP). Words beyond those the scenes use are there for edits that somebody teaches later.
"""

from __future__ import annotations

import json
import string
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from small_world.scenes import COLORS, SHAPES, SIDES

GRAMMAR = """
a an the it of on to in into with and background picture image
make paint turn remove delete move bigger larger smaller
"""
SPARE = """
add put draw give take away change replace around behind under over above below inside
frame border shadow hat hole outline stripe stripes dot dots ring line lines grid pattern
blueprint drawing sketch neon sign sticker stamp night day snow rain fire glow mirror tile
style like as is two three many more less very light dark big small thin thick round flat
this that its object shape color colour pink brown gray grey gold silver up down
"""
WORDS = tuple(dict.fromkeys((*GRAMMAR.split(), *COLORS, *SHAPES, *SIDES, *SPARE.split())))
CLIP_LENGTH = 77
CLIP_MERGES = 2000


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_t5_tokenizer(folder: Path) -> int:
    """Write a SentencePiece-like unigram tokenizer into `folder`; returns the size of its vocabulary."""
    letters = string.printable.strip()
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0), *((c, -8.0) for c in letters)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.Strip()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512, "extra_ids": 0, **special}
    _write_json(folder / "tokenizer_config.json", config)
    return len(pieces)


def _learn_merges() -> list[tuple[str, str]]:
    """Byte-pair merges that join each word of WORDS into one token."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=CLIP_MERGES, min_frequency=1, show_progress=False, end_of_word_suffix="</w>"
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in merges]


def write_clip_tokenizer(folder: Path) -> int:
    """Write a byte-level BPE tokenizer into `folder`; returns the size of its vocabulary (last: end of text)."""
    merges = _learn_merges()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>"} | dict.fromkeys(
        ("eos_token", "pad_token", "unk_token"), "<|endoftext|>"
    )
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": CLIP_LENGTH,
        "do_lower_case": True,
        **special,
    }
    _write_json(folder / "tokenizer_config.json", config)
    return len(tokens)
