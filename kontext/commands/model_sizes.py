"""What the options say about models, in the sizes that the memory estimate takes. Only headers of files are read."""

from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from kontext.checkpoints import empty_autoencoder, empty_clip, empty_t5
from kontext.device import Precision, precision_of
from kontext.memory.needs import Text, Vae
from kontext.memory.weights import Weights, weights_of
from kontext.model.autoencoder import AutoencoderConfig
from kontext.model.clip import ClipText
from kontext.model.t5 import T5Encoder
from kontext.model.transformer import TransformerConfig
from kontext.options.generate import Generate
from kontext.options.train import Train
from kontext.quant import STRIP, Mode, quantisable, stored_bytes


@dataclass(frozen=True)
class TextSizes:
    """Of T5 and CLIP: shapes of T5's linears and how many of each, all other numbers, T5's heads and width."""

    linears: tuple[tuple[tuple[int, int], int], ...]
    others: int
    heads: int
    width: int


@dataclass(frozen=True)
class PictureModels:
    """The autoencoder's sizes and its numbers, and the text encoders' sizes."""

    autoencoder: AutoencoderConfig
    numbers: int
    text: TextSizes


def picture_models(options: Generate | Train) -> PictureModels:
    """From the files. Raises UserError for one that is missing, incomplete or of another kind."""
    assert options.vae and options.text_encoder1 and options.text_encoder2
    autoencoder = empty_autoencoder(options.vae)
    text = text_sizes(empty_t5(options.text_encoder1), empty_clip(options.text_encoder2))
    return PictureModels(autoencoder.config, _numbers(autoencoder), text)


def text_sizes(t5: T5Encoder, clip: ClipText) -> TextSizes:
    shapes = Counter(tuple(m.weight.shape) for m in t5.modules() if isinstance(m, nn.Linear))
    inside = sum(rows * columns * count for (rows, columns), count in shapes.items())
    return TextSizes(
        linears=tuple(shapes.items()),
        others=_numbers(t5) - inside + _numbers(clip),
        heads=t5.config.heads,
        width=t5.config.width,
    )


def _numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def transformer_weights(
    config: TransformerConfig, precision: Precision, mode: Mode | None, *, strips: bool = False
) -> Weights:
    """mode: the form of the blocks' linears on tokens, where it is in few bits; strips: as in `restored`."""
    itemsize, kept = precision.computing.itemsize, precision.kept.itemsize
    if mode is None and kept == itemsize:
        return weights_of(config, itemsize=itemsize)
    linear = partial(_linear_bytes, mode=mode, kept=kept)
    many = partial(restored, mode=mode, strips=strips)
    return weights_of(config, itemsize=itemsize, linear=linear, restored=many, kept=kept)


def _linear_bytes(rows: int, columns: int, *, mode: Mode | None, kept: int) -> int:
    plain = mode is None or not quantisable((rows, columns), mode)
    return rows * columns * kept if plain else stored_bytes(rows, columns, mode)


def restored(numbers: int, *, mode: Mode | None, strips: bool) -> int:
    """Numbers in the compute type that a product takes with a weight of so many, which is kept in another form.

    strips: whether some rows at a time are restored, as by `quant.restored`. Products of 8-bit numbers restore
    nothing, and take about twice that for results in 32 bits.
    """
    if mode is not None and mode.endswith("_fast"):
        return 2 * numbers
    return min(numbers, STRIP) if strips else numbers


def vae_of(options: Generate | Train, models: PictureModels, device: torch.device) -> Vae:
    itemsize = precision_of(options.vae_dtype, device).computing.itemsize
    return Vae(models.autoencoder, models.numbers * itemsize, itemsize, options.vae_tiling == "on")


def text_of(
    options: Generate | Train, text: TextSizes, precision: Precision, *, strips: bool = False
) -> Text:
    """The encoders; with --fp8-t5 T5's linears in 8 bits. strips: as in `restored`."""
    mode: Mode | None = "int8" if options.fp8_t5 else None
    itemsize, kept = precision.computing.itemsize, precision.kept.itemsize
    linears = sum(count * _linear_bytes(*shape, mode=mode, kept=kept) for shape, count in text.linears)
    widest = max(rows * columns for (rows, columns), _ in text.linears)
    return Text(
        weights=linears + text.others * itemsize,
        heads=text.heads,
        width=text.width,
        length=options.t5_max_length,
        scratch=restored(widest, mode=mode, strips=strips) * itemsize if mode or kept != itemsize else 0,
    )
