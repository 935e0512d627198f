"""Blocks as fused kernels, made by torch's compiler.

Between its matrix products a block passes over memory a dozen times; compiled, four times. One graph serves all
blocks of a kind, any number of tokens, and any weights: they may be streamed or in few bits.
"""

import os
import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from kontext.errors import UserError
from kontext.model.blocks import DoubleStreamBlock, SingleStreamBlock

GRAPHS = 64  # adapters of different ranks, and steps with and without gradients, have graphs of their own


def compile_blocks(model: nn.Module, device: torch.device, *, backend: str = "inductor") -> None:
    """Let every block of a transformer, wrapped or not, compile itself at its first use.

    Kernels are kept in the user's cache folder for later runs, unless TORCHINDUCTOR_CACHE_DIR names another.
    Raises UserError when what compiles for `device` is not installed.
    """
    _check_compiler(device)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "kontext" / "compiled"))
    # It means the table of positions, of which there is no more than a view.
    warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex")
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, GRAPHS)
    for module in model.modules():
        if isinstance(module, DoubleStreamBlock | SingleStreamBlock):
            module.compile(dynamic=True, backend=backend)


def _check_compiler(device: torch.device) -> None:
    if device.type == "cuda" and find_spec("triton") is None:
        raise UserError("--compile needs the package triton on a GPU: install it, or leave --compile out.")
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise UserError("--compile needs a C++ compiler on a CPU: install g++, or leave --compile out.")
