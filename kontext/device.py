"""Names of devices and precisions as a user writes them, and what torch calls them."""

from dataclasses import dataclass

import psutil
import torch

from kontext import console
from kontext.errors import UserError
from kontext.processes import local_rank


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` -> the device. Raises UserError when that GPU is not there.

    Of several processes on a machine each takes a GPU of its own, and uses no other: what goes to CUDA without a
    number, page-locked memory too, would take half a gigabyte of the first one.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and device.index is None and (number := local_rank()) is not None:
        device = torch.device("cuda", number)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device {name}: PyTorch {torch.__version__} sees no CUDA GPU. Use --device cpu, or install "
            "a build of PyTorch for your GPU (https://pytorch.org/get-started/locally)."
        )
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: there is no {device}; there are {torch.cuda.device_count()} GPUs, counted from cuda:0."
        )
    if device.index is not None:
        torch.cuda.set_device(device)
    return device


@dataclass(frozen=True)
class Precision:
    """Of a model: of its arithmetic and activations, and of the weights of its large linears in memory."""

    computing: torch.dtype
    kept: torch.dtype


def resolve_dtype(name: str) -> torch.dtype:
    """`float32`, `bfloat16` or `float16` -> torch's dtype."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def precision_of(name: str, device: torch.device) -> Precision:
    """What a type's name stands for on `device`.

    A processor without instructions for 16 bits multiplies matrices of them 10 to 100 times slower than in float32.
    There weights are kept in what was asked for, and computed with in float32.
    """
    dtype = resolve_dtype(name)
    slow = device.type == "cpu" and not is_fast(dtype)
    return Precision(torch.float32 if slow else dtype, dtype)


def told_precision(name: str, device: torch.device, option: str = "--dtype") -> Precision:
    """The same, with a notice where it is not what the name says, and a warning for float16."""
    found = precision_of(name, device)
    if found.computing != found.kept:
        weights = " Large weights stay in 16 bits: half the memory of --dtype float32, at about its speed."
        console.notice(
            f"{option} {name}: this processor has no instructions for it, and computes in float32."
            + (weights if option == "--dtype" else "")
        )
    elif name == "float16":
        console.warn(
            "FLUX.1 Kontext overflows in float16: expect black pictures or a NaN loss. Use --dtype bfloat16."
        )
    return found


def is_fast(dtype: torch.dtype) -> bool:
    """Whether the CPU multiplies matrices of this type, or torch's library makes up for what it lacks."""
    known = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype not in known or known[dtype]()


def memory_used(device: torch.device) -> int:
    """Bytes in use: the most that PyTorch has reserved on a GPU, the process' resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return psutil.Process().memory_info().rss
