"""What an optimizer keeps of the parameters: found by letting it take a step with parameters of the same shapes."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from kontext.errors import UserError
from kontext.training.arguments import Value
from kontext.training.optimizers import make_optimizer

LARGEST = 2**20  # numbers of a parameter to try with: larger ones are taken to need as much for each number
RATE = 1e-4


def optimizer_bytes(
    name: str, shapes: Iterable[tuple[int, ...]], *, arguments: Mapping[str, Value], device: torch.device
) -> int:
    """Bytes on `device` of the state of the optimizer `name` for parameters of these shapes.

    Raises UserError as `make_optimizer` does, and for one that cannot take a step as training does.
    """
    counts = Counter(shapes)
    tried = [nn.Parameter(torch.full(_tried(shape), 0.1, device=device)) for shape in counts]
    optimizer = make_optimizer(name, [{"params": tried, "lr": RATE}], arguments=arguments)
    if hasattr(
        optimizer, "is_paged"
    ):  # pages lie on the device while they are used, and are not had on a CPU
        optimizer.is_paged = False
    for parameter in tried:
        parameter.grad = torch.full_like(parameter, 0.01)
    _step(name, optimizer)
    return sum(
        count * _state_bytes(optimizer, parameter) * math.prod(shape) // parameter.numel()
        for parameter, (shape, count) in zip(tried, counts.items(), strict=True)
    )


def _step(name: str, optimizer: Optimizer) -> None:
    try:
        optimizer.step()
    except Exception as error:  # whatever a class of somebody else may raise
        raise UserError(f"--optimizer-type {name}: cannot take a step here ({error}).") from error


def _tried(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The same shape, with fewer rows if it is large."""
    rows, *rest = shape
    return (max(1, min(rows, LARGEST // math.prod(rest))), *rest)


def _state_bytes(optimizer: Optimizer, parameter: nn.Parameter) -> int:
    tensors = [leaf for leaf in tree_leaves(optimizer.state[parameter]) if isinstance(leaf, Tensor)]
    return sum(tensor.nbytes for tensor in tensors if tensor.device == parameter.device)
