"""Names of devices and precisions as a user writes them, and what torch calls them."""

import psutil
import torch

from kontext import console
from kontext.errors import UserError
from kontext.processes import local_rank


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` -> the device. Raises UserError when that GPU is not there.

    Of several processes on a machine each takes a GPU of its own.
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
    return device


def resolve_dtype(name: str) -> torch.dtype:
    """`float32`, `bfloat16` or `float16` -> torch's dtype, with a warning for float16."""
    if name == "float16":
        console.warn(
            "FLUX.1 Kontext overflows in float16: expect black pictures or a NaN loss. Use --dtype bfloat16."
        )
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def computing_dtype(name: str, device: torch.device, option: str = "--dtype") -> torch.dtype:
    """As `resolve_dtype`, for computing on `device`; tells when the processor is slow with it."""
    dtype = resolve_dtype(name)
    if device.type == "cpu" and not _is_fast(dtype):
        console.notice(
            f"This processor has no instructions for {name}, and is very slow with it: use {option} float32."
        )
    return dtype


def _is_fast(dtype: torch.dtype) -> bool:
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
