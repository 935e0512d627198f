"""What a block does between its matrix products: passes over memory, each marked so that it can be made again.

B batch, L tokens, D width, H heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kontext.model.attention import rotate
from kontext.model.remade import remade


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


@remade
def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) * LayerNorm(x) + shift."""
    return torch.addcmul(shift, 1 + scale, layer_norm(x))


def gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """x + gate * update, in one pass over memory."""
    return torch.addcmul(x, gate, update)


def residual(x: Tensor, gate: Tensor, proj: nn.Module, update: Tensor) -> Tensor:
    """x + gate * proj(update)."""
    return gated(x, gate, proj(update))


@remade
def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


@remade
def join(first: Tensor, second: Tensor) -> Tensor:
    """Tokens (B, H, L, D) of both streams in one sequence."""
    return torch.cat((first, second), 2)


@remade
def beside(out: Tensor, hidden: Tensor) -> Tensor:
    """The attention's output, and GELU of the MLP's hidden values, along the channels."""
    return torch.cat((out, F.gelu(hidden, approximate="tanh")), -1)


@remade
def turned(x: Tensor, scale: Tensor, pe: Tensor) -> Tensor:
    """Queries or keys (B, H, L, D) after RMS norm with `scale` (D,) and rotation by their positions."""
    return rotate(F.rms_norm(x, scale.shape, scale.to(x.dtype), eps=1e-6), pe)
