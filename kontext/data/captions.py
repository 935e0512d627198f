"""From the words beside a picture to the captions it is trained with: all of them are cached, one is chosen at a time."""

import random
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

SHUFFLES = 8


class CaptionKeys(BaseModel):
    """Keys of a dataset file that say what becomes of a caption."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    caption_extension: tuple[str, ...] = Field(
        (".txt",),
        min_length=1,
        description="What a caption file's name ends in; a list where there are several, of which one is chosen per epoch.",
    )
    multiple_captions: bool = Field(
        False, description="Each line is a caption of its own; one is chosen per epoch."
    )
    trigger_word: str | None = Field(
        None, description="Put before captions without it; takes the place of [trigger] in them."
    )
    caption_prefix: str = Field("", description="Put before each caption.")
    caption_suffix: str = Field("", description="Put behind each caption.")
    shuffle_caption: bool = Field(False, description="Choose an order of a caption's tags per epoch.")
    caption_separator: str = Field(",", min_length=1, description="What stands between tags.")
    keep_tokens: int = Field(0, ge=0, description="Tags at the beginning that stay where they are.")
    shuffle_variants: int = Field(
        SHUFFLES, ge=1, description="Orders of tags to choose from: each is cached."
    )
    caption_dropout_rate: float = Field(
        0.0, ge=0, le=1, description="Share of items that are shown with the empty prompt."
    )


def captions_of(texts: Sequence[str], keys: CaptionKeys, image: Path) -> tuple[str, ...]:
    """All captions that `texts` give, different from one another. The first is the plainest; there is at least one.

    Orders of tags follow from the picture's name alone, so that caches stay valid.
    """
    lines = list(texts)
    if keys.multiple_captions:
        lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    found = []
    for line in lines or [""]:
        source = random.Random(f"{image.name}/{line}")
        orders = [line] + [_shuffled(line, keys, source) for _ in range(keys.shuffle_variants - 1)]
        found += [_framed(order, keys) for order in (orders if keys.shuffle_caption else [line])]
    return tuple(dict.fromkeys(found))


def _shuffled(line: str, keys: CaptionKeys, source: random.Random) -> str:
    tags = [tag.strip() for tag in line.split(keys.caption_separator)]
    kept, rest = tags[: keys.keep_tokens], [tag for tag in tags[keys.keep_tokens :] if tag]
    source.shuffle(rest)
    return f"{keys.caption_separator.strip()} ".join(kept + rest)


def _framed(caption: str, keys: CaptionKeys) -> str:
    """The caption with trigger word, prefix and suffix."""
    word = keys.trigger_word
    if word:
        caption = caption.replace("[trigger]", word)
        if word not in caption:
            caption = f"{word}, {caption}" if caption else word
    return " ".join(part for part in (keys.caption_prefix, caption, keys.caption_suffix) if part)
