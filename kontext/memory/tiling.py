"""The autoencoder in strips of rows: a picture larger than the memory for its feature maps, without seams.

Nothing is cut into tiles that do not know of each other. Layer by layer, a convolution reads each strip with the rows
beside it, and group norms, which look at the whole picture, gather its statistics from all strips before the first is
normed. So the result is that of the whole picture, to rounding. Of the feature maps only a layer's input and output
exist in full; all between them is as large as a strip.

B batch, C channels, H rows, W columns; x are feature maps (B, C, H, W).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kontext.memory.estimate import decoding_picture, encoding_picture
from kontext.memory.free import free_bytes
from kontext.model.autoencoder import (
    AttnBlock,
    Autoencoder,
    Decoder,
    Downsample,
    Encoder,
    Level,
    ResnetBlock,
    Upsample,
    attend,
    in_rows,
)
from kontext.model.convolution import Conv3x3, empty_like, with_neighbours
from kontext.model.group_norm import by_channel

STRIP_BYTES = 16 * 2**20

Mode = Literal["auto", "on", "off"]
Read = Callable[[int, int], Tensor]
"""Rows `top` to `bottom` of a feature map, as a convolution is to see them."""
Norm = Callable[[Tensor], Tensor]


class Tiled(nn.Module):
    """An encoder or decoder that works in strips: always, or when a GPU has less free memory than it `needs`.

    needs: bytes for one picture of so many pixels in numbers of so many bytes.
    """

    def __init__(self, base: Encoder | Decoder, needs: Callable[[int, int], int], *, always: bool) -> None:
        super().__init__()
        self.base = base
        self.needs = needs
        self.always = always

    def forward(self, x: Tensor) -> Tensor:
        """As `base`."""
        if not (self.always or self.is_short(x)):
            return self.base(x)
        return encode(self.base, x) if isinstance(self.base, Encoder) else decode(self.base, x)

    def is_short(self, x: Tensor) -> bool:
        """Whether memory is short for the batch x. On a CPU it never is: there it can be swapped out."""
        needed = len(x) * self.needs(x.shape[2] * x.shape[3], x.element_size())
        return x.is_cuda and needed > free_bytes(x.device)


def tile(model: Autoencoder, mode: Mode) -> Autoencoder:
    """The same autoencoder, working in strips of rows as `mode` says: auto, when memory is short."""
    if mode != "off":
        config, always = model.config, mode == "on"
        area = model.factor**2

        def encoding(pixels: int, itemsize: int) -> int:
            return encoding_picture(config, 0, pixels=pixels, itemsize=itemsize).device

        def decoding(latents: int, itemsize: int) -> int:
            return decoding_picture(config, 0, pixels=area * latents, itemsize=itemsize).device

        model.encoder = Tiled(model.encoder, encoding, always=always)
        model.decoder = Tiled(model.decoder, decoding, always=always)
    return model


def encode(encoder: Encoder, x: Tensor) -> Tensor:
    """What `encoder` makes of images x."""
    return _run(encoder, [*_layers(encoder.down), *encoder.mid.children()], x)


def decode(decoder: Decoder, x: Tensor) -> Tensor:
    """What `decoder` makes of latents x."""
    return _run(decoder, [*decoder.mid.children(), *_layers(reversed(decoder.up))], x)


def _layers(levels: Iterable[Level]) -> Iterator[nn.Module]:
    for level in levels:
        yield from level.block
        yield from (step for name, step in level.named_children() if name != "block")


def _run(model: Encoder | Decoder, layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """All layers in one loop: nested calls would each keep the map that they began with."""
    x = conv(model.conv_in, _rows_of(x), _like(x, model.conv_in))
    for layer in layers:
        x = WORKERS[type(layer)](layer, x)
    return conv(model.conv_out, _activated(norm(model.norm_out, x), x), _like(x, model.conv_out))


def resnet(block: ResnetBlock, x: Tensor) -> Tensor:
    """A ResnetBlock. Its result takes the place of its inner feature map, strip by strip."""
    hidden = conv(block.conv1, _activated(norm(block.norm1, x), x), _like(x, block.conv1))
    normed = norm(block.norm2, hidden)
    above = hidden[:, :, :0]  # the row above the strip, as it was before the result took its place
    for top, bottom in strips(x, hidden):
        rows = torch.cat((above, hidden[:, :, top : bottom + 1]), 2)
        above = hidden[:, :, bottom - 1 : bottom].clone()
        own = hidden[:, :, top:bottom]
        _conv(block.conv2, F.silu(normed(rows), inplace=True), own, top == 0, bottom == x.shape[2])
        own += block.shortcut(x[:, :, top:bottom])
    return hidden


def attention(block: AttnBlock, x: Tensor) -> Tensor:
    """An AttnBlock, in x's place: queries by strips, keys and values of the whole picture."""
    normed = norm(block.norm, x)
    k, v = (
        torch.cat([in_rows(f(normed(x[:, :, a:b]))) for a, b in strips(x)], 2) for f in (block.k, block.v)
    )
    queries = [block.q(normed(x[:, :, top:bottom])) for top, bottom in strips(x)]
    for (top, bottom), q in zip(strips(x), queries, strict=True):
        x[:, :, top:bottom] += block.proj_out(attend(q, k, v))
    return x


def downsample(part: Downsample, x: Tensor) -> Tensor:
    """A Downsample: row i of the result is made of rows 2 i to 2 i + 2, of which the last may be outside."""
    height = x.shape[2] // 2
    out = empty_like(x, part.conv.out_channels, height, x.shape[3] // 2)
    for top, bottom in strips(x, out, height=height):
        rows = x[:, :, 2 * top : 2 * bottom + 1]
        outside = 2 * bottom + 1 > x.shape[2]
        out[:, :, top:bottom] = part.conv(F.pad(rows, (0, 1, 0, int(outside))))
    return out


def upsample(part: Upsample, x: Tensor) -> Tensor:
    """An Upsample; the doubled rows exist for a strip only."""
    out = empty_like(x, part.conv.out_channels, 2 * x.shape[2], 2 * x.shape[3])
    for top, bottom in strips(out, height=x.shape[2]):
        part.conv.rows(with_neighbours(x, top, bottom), out[:, :, 2 * top : 2 * bottom])
    return out


WORKERS: dict[type[nn.Module], Callable[..., Tensor]] = {
    ResnetBlock: resnet,
    AttnBlock: attention,
    Downsample: downsample,
    Upsample: upsample,
}


def conv(layer: Conv3x3, read: Read, out: Tensor) -> Tensor:
    """A 3x3 convolution of the map that `read` reads, of out's height and width, into out."""
    height = out.shape[2]
    for top, bottom in strips(out, channels=layer.in_channels):
        rows = read(max(top - 1, 0), min(bottom + 1, height))
        _conv(layer, rows, out[:, :, top:bottom], top == 0, bottom == height)
    return out


def _conv(layer: Conv3x3, rows: Tensor, out: Tensor, first: bool, last: bool) -> None:
    """rows: of the strip `out`, with one more on each side but where the picture ends."""
    if first or last:
        rows = F.pad(rows, (0, 0, int(first), int(last)))
    layer.rows(rows, out)


def norm(layer: nn.GroupNorm, x: Tensor) -> Norm:
    """The group norm of x, to be applied to parts of it."""
    scale, shift = by_channel(layer, x, (x[:, :, top:bottom] for top, bottom in strips(x)))
    return lambda rows: torch.addcmul(shift, rows.to(scale.dtype), scale).to(x.dtype)


def _activated(normed: Norm, x: Tensor) -> Read:
    return lambda top, bottom: F.silu(normed(x[:, :, top:bottom]), inplace=True)


def _rows_of(x: Tensor) -> Read:
    return lambda top, bottom: x[:, :, top:bottom]


def strips(*maps: Tensor, channels: int = 0, height: int | None = None) -> Iterator[tuple[int, int]]:
    """First row and the one after the last of each strip.

    A strip of the widest of `maps`, or of one with `channels`, has STRIP_BYTES at most. height: of what is cut.
    """
    height = maps[0].shape[2] if height is None else height
    row = (
        max(len(m) * max(m.shape[1], channels) * m.shape[2] * m.shape[3] * m.element_size() for m in maps)
        / height
    )
    rows = max(1, int(STRIP_BYTES / row))
    for top in range(0, height, rows):
        yield top, min(top + rows, height)


def _like(x: Tensor, layer: Conv3x3) -> Tensor:
    return empty_like(x, layer.out_channels, x.shape[2], x.shape[3])
