"""The processes of a run, on one machine or several: what they must do together."""

from collections.abc import Iterable
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from kontext.errors import UserError

T = TypeVar("T")


class Team:
    """A thin layer over accelerate. With one process everything here does nothing.

    Every method is called by all processes at the same point of the run.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.size: int = accelerator.num_processes
        self.rank: int = accelerator.process_index
        self.leads: bool = accelerator.is_main_process

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Every process gets the sum of all gradients; one without a batch in this step adds zeros."""
        if self.size == 1:
            return
        parameters = list(parameters)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = self.sum(torch.cat([parameter.grad.flatten() for parameter in parameters]))
        start = 0
        for parameter in parameters:
            end = start + parameter.numel()
            parameter.grad.copy_(flat[start:end].view_as(parameter))
            start = end

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes. Raises UserError when one of them has ended."""
        if self.size == 1:
            return values
        try:
            return self.accelerator.reduce(values, reduction="sum")
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError("Another process of this run has ended; see its own message.") from error

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in their order: small ones, seldom, for they are copied to and fro."""
        return [value] if self.size == 1 else gather_object([value])

    def deal(self, count: int) -> range:
        """Which of `count` uses of the model, from 0, are this process' part."""
        return range(count)[self.rank :: self.size]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return (
            flag if self.size == 1 else bool(self.sum(torch.tensor([flag], device=self.device).int()).item())
        )

    def finish(self) -> None:
        """Wait until every process has come here, then close logs and the connection."""
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
