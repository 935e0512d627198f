"""The processes of a run, on one machine or several: what they must do together."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import gather_object
from torch import Tensor, nn

from kontext import console
from kontext.errors import UserError
from kontext.training.shares import Shares

T = TypeVar("T")
BUCKET = 2**26  # numbers that are summed at once: copies of all gradients of a whole model would not fit


class Later:
    """A number on its way from the device. Reading it waits for the work before it, not for what was queued since."""

    def __init__(self, number: Tensor) -> None:
        self.arrived: torch.cuda.Event | None = None
        self.number = number
        if number.device.type == "cuda":
            self.number = torch.empty_like(number, device="cpu", pin_memory=True)
            self.number.copy_(number, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> float:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.number.item()


class Team:
    """A thin layer over accelerate. With one process everything here does nothing.

    Every method is called by all processes at the same point of the run.

    together: whether the processes share one model (see `split`) instead of having one each. Then all take part in every
    use of it and in every save, and `shares` says what each holds.
    """

    together = False
    shares = Shares()

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.size: int = accelerator.num_processes
        self.rank: int = accelerator.process_index
        self.leads: bool = accelerator.is_main_process
        self._asked: Later | None = None

    @property
    def saves(self) -> bool:
        """Whether this process takes part when weights are saved."""
        return self.leads or self.together

    def run(self, use: Callable[[], T]) -> T:
        """What `use` returns, which may use the model."""
        return use()

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Every process gets the sum of all gradients.

        What took no part in this step (all of a process without a batch, an adapter that dropout skips) has zeros, with
        one process too: an optimizer passes over what has none, and would do otherwise with another number of processes.
        """
        everything = list(parameters)
        for parameter in everything:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.size == 1:
            return
        for bucket in _buckets(everything):
            flat = self.sum(torch.cat([parameter.grad.flatten() for parameter in bucket]))
            sums = flat.split([parameter.numel() for parameter in bucket])
            for parameter, part in zip(bucket, sums, strict=True):
                parameter.grad.copy_(part.view_as(parameter))

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The norm of all gradients together."""
        return nn.utils.get_total_norm(gradients)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes."""
        return values if self.size == 1 else self.accelerator.reduce(values, reduction="sum")

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in their order: small ones, seldom, for they are copied to and fro."""
        if self.size == 1:
            return [value]
        with self.in_touch():
            return gather_object([value])

    def deal(self, count: int) -> range:
        """Which of `count` uses of the model, from 0, are this process' part."""
        return range(count)[self.rank :: self.size]

    def any_before(self, flag: bool) -> bool:
        """Whether the flag was set in any process at the last call: on a GPU the answer of now would be waited for."""
        if self.size == 1:
            return flag
        before, self._asked = self._asked, Later(self.sum(torch.full((), float(flag), device=self.device)))
        return before is not None and before.read() > 0

    @contextmanager
    def in_touch(self) -> Iterator[None]:
        """Within, whatever fails because another process cannot be reached any more raises a UserError that says so.

        With FSDP that is any use of the model, also within torch's own backward pass.
        """
        try:
            yield
        except RuntimeError as error:
            if not (isinstance(error, dist.DistError) or re.search("gloo|nccl", str(error), re.IGNORECASE)):
                raise
            reason = str(error).strip().splitlines()[0]
            late = re.search("timed? ?out", reason, re.IGNORECASE)
            what = "does not answer (--ddp-timeout)" if late else "has ended"
            raise UserError(f"Another process of this run {what}; see its own message. ({reason})") from error

    def track(self, use: Callable[[GeneralTracker], None]) -> None:
        """Has every logger do something. One that fails is told of and left out from then on: logs end no training."""
        for tracker in list(self.accelerator.trackers):
            try:
                use(tracker)
            except Exception as error:  # whatever the disk, the network and the logger's package may raise
                self.accelerator.trackers.remove(tracker)
                console.warn(f"{tracker.name} logs nothing more: {' '.join(str(error).split())}")

    def finish(self) -> None:
        """Wait until every process has come here, then close logs and the connection."""
        with self.in_touch():
            self.accelerator.wait_for_everyone()
        self.track(lambda tracker: tracker.finish())
        self.accelerator.trackers.clear()
        with self.in_touch():
            self.accelerator.end_training()


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters in their order, of one dtype and of at most BUCKET numbers in all, or one alone."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        size = sum(each.numel() for each in bucket) + parameter.numel()
        if bucket and (size > BUCKET or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
