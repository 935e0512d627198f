"""Attention kernels by name. Packages other than torch are imported only when asked for."""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kontext.errors import UserError
from kontext.model.attention import Attend, sdpa

FLOAT32 = 4
SCORES = 256 * 2**20
"""Bytes of float32 scores that `in_parts` allows at once."""
# mode: (module, function); each takes and returns (B, L, H, D).
TOKENS_FIRST = {
    "flash": ("flash_attn", "flash_attn_func"),
    "flash3": ("flash_attn_interface", "flash_attn_func"),
    "xformers": ("xformers.ops", "memory_efficient_attention"),
}

CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
RTX_50 = 12  # the compute capability of these cards


def attention_backend(mode: str, device: torch.device | None = None) -> Attend:
    """The attention function of `--attn-mode`: torch or sdpa, flash, flash3, sage, xformers; for `device`.

    Raises UserError if the package behind it is not installed.
    """
    if mode in ("torch", "sdpa"):
        return cudnn_first if device is not None and _wants_cudnn(device) else sdpa
    if mode == "sage":
        return require("sageattention", mode).sageattn
    package, function = TOKENS_FIRST[mode]
    kernel = getattr(require(package, mode), function)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = kernel(*(x.transpose(1, 2) for x in (q, k, v)))
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attend


def _wants_cudnn(device: torch.device) -> bool:
    """Whether cuDNN's kernel is faster on a GPU, and torch does not know: it takes that by itself on H100 and B200."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == RTX_50


def cudnn_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's attention by cuDNN's kernel where that can, else by the next."""
    with sdpa_kernel(CUDNN_FIRST, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v)


def in_parts(attend: Attend) -> Attend:
    """The same attention for some queries at a time: a kernel that holds their scores never holds all of them."""

    def attend_in_parts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        row = q.shape[0] * q.shape[1] * k.shape[2] * FLOAT32
        parts = [attend(some, k, v).transpose(1, 2) for some in q.split(max(1, SCORES // row), 2)]
        return torch.cat(parts, 1).transpose(1, 2)

    return attend_in_parts


def require(package: str, mode: str) -> ModuleType:
    """The module `package`, or one sentence that says what to install."""
    if find_spec(package.partition(".")[0]) is None:
        raise UserError(
            f"--attn-mode {mode} needs the package {package.partition('.')[0]}, which is not installed: "
            "install it, or use --attn-mode sdpa."
        )
    return import_module(package)


def use_attention(model: nn.Module, attend: Attend) -> None:
    """Let every block of a transformer (wrapped or not) attend with `attend`."""
    for module in model.modules():
        if hasattr(module, "attend"):
            module.attend = attend
