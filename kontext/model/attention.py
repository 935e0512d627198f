"""Attention over text and image tokens, with rotary positions.

B batch, H heads, L tokens, D channels of one head.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kontext.model.remade import remade

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q, k, v), each (B, H, L, D), to (B, H, L, D): softmax(q k^T / sqrt(D)) v."""


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's attention, which picks the fastest kernel of the device."""
    return F.scaled_dot_product_attention(q, k, v)


def rope(ids: Tensor, axes: tuple[int, ...], theta: float) -> Tensor:
    """Rotation of every channel pair for positions `ids` (B, L, len(axes)).

    Axis i turns axes[i]/2 pairs by ids[..., i] * theta^(-2j/axes[i]), j = 0, 1, ... (RoFormer, by axis).
    Returns (B, 1, L, sum(axes)/2): unit complex numbers in complex64, from angles in float64, where large
    positions keep their digits.
    """
    angles = []
    for axis, channels in enumerate(axes):
        steps = torch.arange(0, channels, 2, dtype=torch.float64, device=ids.device)
        angles.append(ids[..., axis, None].double() * theta ** (-steps / channels))
    angle = torch.cat(angles, -1).unsqueeze(1)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def rotate(x: Tensor, pe: Tensor) -> Tensor:
    """Turn the neighbouring channel pairs of x (B, H, L, D) by pe (B, 1, L, D/2), in float32.

    A pair is a complex number: one multiplication instead of six passes over memory. torch's compiler knows no complex
    numbers, and needs none for one pass.
    """
    if torch.compiler.is_compiling():
        first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = torch.view_as_real(pe).unbind(-1)
        turned = torch.stack((first * cos - second * sin, first * sin + second * cos), -1)
        return turned.flatten(-2).to(x.dtype)
    pairs = x.float().unflatten(-1, (-1, 2))
    if pairs.stride(-1) != 1:  # gradients of a kernel that lays heads out in another order
        pairs = pairs.contiguous()
    return torch.view_as_real(torch.view_as_complex(pairs) * pe).flatten(-2).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
    """Attention with the heads of its output joined: (B, H, L, D) to (B, L, H*D)."""
    return heads_joined(attend(q, k, v))


@remade
def heads_joined(x: Tensor) -> Tensor:
    """A view where the kernel wrote token by token, else a copy."""
    return rearrange(x, "B H L D -> B L (H D)")
