"""What passes from one stage of a picture to the next. Latents are (1, C, h, w), an eighth of the pixels, on the CPU."""

from dataclasses import dataclass

from torch import Tensor

from kontext.denoiser import Conditioning
from kontext.errors import UserError
from kontext.generation.inpaint import Canvas
from kontext.generation.request import Request

ITEM_ERRORS = (UserError, OSError, RuntimeError)
"""What ends one picture but not those beside it; RuntimeError is out of memory, for one."""


@dataclass(frozen=True)
class Framed:
    """A request with a seed, its output's size in pixels and the latents of its references."""

    request: Request
    width: int
    height: int
    references: tuple[Tensor, ...]
    canvas: Canvas | None = None


@dataclass(frozen=True)
class Conditioned:
    """All that the transformer needs. `negative` is None without true guidance."""

    framed: Framed
    positive: Conditioning
    negative: Conditioning | None


@dataclass(frozen=True)
class Text:
    """A prompt's embeddings: T5 (1, T, D) and CLIP pooled (1, V)."""

    txt: Tensor
    vector: Tensor
