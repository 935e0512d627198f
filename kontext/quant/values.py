"""Weights in few bits: rounded, and restored.

"fp8" casts to 8-bit floats (e4m3: 4 exponent bits, 3 mantissa bits). Values below 2^-10 become 0.
"fp8_scaled" divides blocks of 64 input columns by a scale first, so that the whole range is used; of three
scales the one with the smallest error is taken. "int8" rounds such blocks to whole numbers up to 127. "nf4" has
4 bits a weight, see `four`. "fp8_fast" and "int8_fast" have one scale per row, which products of 8-bit numbers need
(see `products`); weights that such products do not take are kept in blocks.

Relative error of weights 1024 x 3072:
                                             fp8  fp8_fast fp8_scaled int8_fast  int8   nf4
    normal, deviation 0.02                  0.033   0.026    0.023      0.008   0.006  0.092
    Student t with 3 degrees, 0.01          0.038   0.024    0.019      0.040   0.011  0.122
    normal, 0.3 % of columns 50 times larger 0.027  0.018    0.008      0.074   0.017  0.115
    normal, 0.05 % of values 100 times larger 0.027 0.013    0.010      0.102   0.017  0.073

so blocks it is where nothing speaks for rows, at 3 % more memory: whole numbers above all suffer from a scale that one
large value sets for a whole row. A weight whose inputs are no multiple of 64 gets a scale per row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kontext.quant import four

Mode = Literal["fp8", "fp8_scaled", "fp8_fast", "int8", "int8_fast", "nf4"]
FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
EXPONENT = 0x7F800000  # the bits of a float32 that tell its octave
FP8_LEAST = 2.0**-6  # with all mantissa bits; below, the last bit is worth the same
INT8_MAX = 127
BLOCK = four.BLOCK
GRAIN = 16  # products of 8-bit numbers take sizes that are multiples of this
OCTAVES = (0.0, 0.5, 0.625)  # scales to try, above the smallest that cuts nothing off
STRIP = 2**19  # values quantised at a time on a CPU: what is made of them stays in its cache
CHUNK = 2**22  # elsewhere, where many small steps cost more; little memory is needed beside the weight
FOUR_BIT_CHUNK = 2**18  # bitsandbytes compares each value with all 16 levels


@dataclass(frozen=True)
class Quantised:
    """weight (out, in) in 8 bits; scale (out, blocks), in/blocks columns each, or None for a plain cast.

    In 4 bits: weight (out, in/2) uint8, and scale (out, in/64) the largest value of each block.
    """

    weight: Tensor
    scale: Tensor | None


def quantisable(shape: tuple[int, ...], mode: Mode) -> bool:
    """Whether a weight of this shape can be kept so: in 4 bits, a block does not reach over two rows."""
    return mode != "nf4" or shape[1] % BLOCK == 0


def quantise(weight: Tensor, mode: Mode) -> Quantised:
    """Round a weight (out, in). Scales are bfloat16, exact in a bfloat16 forward pass."""
    if mode == "fp8":
        return Quantised(weight.clamp(-FP8_MAX, FP8_MAX).to(FP8), None)
    if mode == "nf4":
        return _in_four_bits(weight)
    rows, columns = weight.shape
    block = columns // _scales(rows, columns, mode)
    dtype = FP8 if mode.startswith("fp8") else torch.int8
    values = torch.empty_like(weight, dtype=dtype)
    scale = weight.new_empty(rows, columns // block, dtype=torch.bfloat16)
    largest, size = FP8_MAX if dtype == FP8 else INT8_MAX, STRIP if weight.device.type == "cpu" else CHUNK
    room: list[Tensor] = []  # used again for every part: fresh memory costs more time than the arithmetic
    for part, target, scales in _chunks(size, weight, values, scale):
        room = room or [torch.empty_like(part, dtype=torch.float32) for _ in range(3)]
        blocks, scaled, spare = (each[: len(part)].view(len(part), -1, block) for each in room)
        blocks.copy_(part.view(blocks.shape))
        smallest = _smallest_scale(blocks, largest)
        best = _best_scale(blocks, smallest, scaled, spare) if dtype == FP8 else _in_bfloat16(smallest)
        torch.div(blocks, best, out=scaled)
        scaled = scaled if dtype == FP8 else scaled.round_()
        target.copy_(scaled.clamp_(-largest, largest).view(part.shape))
        scales.copy_(best[..., 0])
    return Quantised(values, scale)


def _in_four_bits(weight: Tensor) -> Quantised:
    rows, columns = weight.shape
    values = weight.new_empty(rows, columns // 2, dtype=torch.uint8)
    largest = weight.new_empty(rows, columns // BLOCK, dtype=torch.bfloat16)
    for part, target, targets in _chunks(FOUR_BIT_CHUNK, weight, values, largest):
        packed, of_blocks = four.pack(part)
        target.copy_(packed)
        targets.copy_(of_blocks)
    return Quantised(values, largest)


def stored_bytes(rows: int, columns: int, mode: Mode) -> int:
    """What a weight (rows, columns) takes after `quantise`."""
    values = columns // 2 if mode == "nf4" else columns
    return rows * (values + _scales(rows, columns, mode) * torch.bfloat16.itemsize)


def _scales(rows: int, columns: int, mode: Mode) -> int:
    """How many scales a row of a weight has."""
    if mode == "fp8":
        return 0
    by_row = columns % BLOCK > 0 or (mode.endswith("_fast") and grained((rows, columns)))
    return 1 if by_row else columns // BLOCK


def grained(shape: tuple[int, ...]) -> bool:
    """Whether products of 8-bit numbers take a weight of this shape."""
    return all(size % GRAIN == 0 for size in shape)


def _chunks(size: int, weight: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of tensors of equal length, `size` values of the weight (out, in) at a time."""
    rows = max(1, size // weight.shape[1])
    return zip(*(tensor.split(rows) for tensor in (weight, *others)), strict=True)


def _smallest_scale(blocks: Tensor, largest: float) -> Tensor:
    """(out, blocks, 1): what brings the largest value of each block to `largest`."""
    return (blocks.abs().amax(-1, keepdim=True) / largest).clamp(min=1e-30)


def _in_bfloat16(scale: Tensor) -> Tensor:
    return scale.to(torch.bfloat16).float()


def _best_scale(blocks: Tensor, smallest: Tensor, scaled: Tensor, spare: Tensor) -> Tensor:
    """(out, blocks, 1): the scales of least squared error for 8-bit floats. scaled, spare: room like `blocks`."""
    scale, least = smallest, torch.full_like(smallest, torch.inf)
    for octave in OCTAVES:
        tried = _in_bfloat16(smallest * 2**octave)
        rounded = _round_to_fp8(torch.div(blocks, tried, out=scaled), spare)
        error = rounded.mul_(tried).sub_(blocks).square_().sum(-1, keepdim=True)
        scale, least = torch.where(error < least, tried, scale), torch.minimum(error, least)
    return scale


def _round_to_fp8(values: Tensor, beside: Tensor) -> Tensor:
    """Float32 values of at most FP8_MAX, give or take a rounding, overwritten with the nearest 8-bit floats.

    A cast there and back gives the same, but the way back is slow on CPUs. Here `beside`, room for as many numbers,
    takes 1.5 * 2^20 times each value's leading bit: added to that, four bits of the value are left.
    """
    torch.bitwise_and(values.view(torch.int32), EXPONENT, out=beside.view(torch.int32))
    beside.clamp_(min=FP8_LEAST).mul_(1.5 * 2**20)
    return values.add_(beside).sub_(beside)


def dequantise(
    weight: Tensor, scale: Tensor | None, dtype: torch.dtype, *, room: Tensor | None = None
) -> Tensor:
    """The weight (out, in) that the two tensors of a `Quantised` stand for. room: a tensor like it, to be used for it.

    Of 4 bits it comes in memory of its own all the same.
    """
    if scale is None and room is None:
        return weight.to(dtype)
    if weight.dtype == torch.uint8:
        return four.unpack(weight, scale, dtype)
    if (
        weight.dtype == torch.int8 and scale.dtype == dtype and room is None
    ):  # one pass: 8-bit floats take two
        return (weight.view(*scale.shape, -1) * scale[..., None]).view(weight.shape)
    plain = (weight.new_empty(weight.shape, dtype=dtype) if room is None else room).copy_(weight)
    if scale is not None:
        plain.view(len(scale), scale.shape[1], -1).mul_(scale[..., None])
    return plain
