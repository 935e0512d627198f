"""Copies between host and device that run beside the computation."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor


class Copier(Protocol):
    """Copies ahead of the computation."""

    def start(self, target: Tensor, source: Tensor) -> None:
        """Begin to copy, after all computation that was asked for so far."""

    def wait(self, target: Tensor) -> None:
        """Let the computation that follows see the copy into `target` finished."""


class CudaCopier:
    """Copies on a CUDA stream of its own; nothing waits on the host."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.copied: dict[int, torch.cuda.Event] = {}

    def start(self, target: Tensor, source: Tensor) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            target[: source.numel()].copy_(source, non_blocking=True)
            self.copied[target.data_ptr()] = self.stream.record_event()

    def wait(self, target: Tensor) -> None:
        torch.cuda.current_stream(self.stream.device).wait_event(self.copied[target.data_ptr()])


class ThreadCopier:
    """The same contract on the CPU, in a thread."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="kontext-stream")
        self.copied: dict[int, Future] = {}

    def start(self, target: Tensor, source: Tensor) -> None:
        self.copied[target.data_ptr()] = self.pool.submit(self.copy, target, source)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target[: source.numel()].copy_(source)

    def wait(self, target: Tensor) -> None:
        self.copied[target.data_ptr()].result()


def copier_of(device: torch.device) -> Copier:
    """What copies to and from `device`."""
    return CudaCopier(device) if device.type == "cuda" else ThreadCopier()
