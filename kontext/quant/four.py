"""Four bits a weight: NF4, the 16 levels that a normal distribution fills evenly (Dettmers et al. 2023, QLoRA).

Each block of 64 inputs is divided by its largest value, and each weight becomes the nearest level. bitsandbytes has
the kernels, for GPU and CPU; its own layer and state are not used, so that all there is of a weight are two tensors.
"""

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from kontext.errors import UserError

BLOCK = 64
KIND = "nf4"


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of a weight (out, in), in a multiple of 64: two values in each byte (out, in/2), and the largest of each block.

    The latter are (out, in/64) bfloat16: 0.25 bits a weight, and an error of 0.1 % beside one of 9 %.

    Raises UserError without bitsandbytes.
    """
    rows, columns = weight.shape
    packed, largest = _operators().quantize_4bit(weight.contiguous(), BLOCK, KIND, torch.uint8)
    return packed.view(rows, columns // 2), largest.view(rows, -1).bfloat16()


def unpack(packed: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) of `pack`, in any float type of 16 or 32 bits."""
    shape = [packed.shape[0], 2 * packed.shape[1]]
    restore = torch.ops.bitsandbytes.dequantize_4bit  # there since `pack` made the weight
    return restore(packed.view(-1, 1), largest.float().view(-1), BLOCK, KIND, shape, dtype)


def _operators() -> ModuleType:
    """bitsandbytes' operators, which it registers with torch when it is imported: seconds that only nf4 waits."""
    try:
        import_module("bitsandbytes")
    except ImportError as error:
        raise UserError("--nf4 needs the package bitsandbytes: pip install bitsandbytes.") from error
    return torch.ops.bitsandbytes
