"""Optimizers by name. Packages other than torch are imported only when asked for."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from kontext.errors import UserError
from kontext.training.arguments import Value

# name: (class, arguments that differ from the class's own defaults)
OPTIMIZERS: dict[str, tuple[str, dict[str, Value]]] = {
    "adamw": ("torch.optim.AdamW", {"fused": True}),  # several times as fast, with no copies of gradients
    "adamw8bit": ("bitsandbytes.optim.AdamW8bit", {}),
    "pagedadamw8bit": ("bitsandbytes.optim.PagedAdamW8bit", {}),
    "lion8bit": ("bitsandbytes.optim.Lion8bit", {}),
    "adafactor": (
        "transformers.optimization.Adafactor",
        {"scale_parameter": False, "relative_step": False, "warmup_init": False},
    ),
    "prodigy": ("prodigyopt.Prodigy", {}),
    "adamwschedulefree": ("schedulefree.AdamWScheduleFree", {}),
    "sgd": ("torch.optim.SGD", {}),
}
PACKAGES = {"bitsandbytes": "bitsandbytes", "prodigyopt": "prodigyopt", "schedulefree": "schedulefree"}


def class_of(name: str) -> tuple[type[Optimizer], dict[str, Value]]:
    """The optimizer class `name` means, and its arguments: a known name in any spelling, or `module.Class`.

    Without a module a class is torch.optim's.

    Raises UserError for an unknown name, a package that is not installed, a class that is no optimizer.
    """
    key = name.lower().replace("_", "").replace("-", "")
    own = name if "." in name else f"torch.optim.{name}"
    if key not in OPTIMIZERS and "." not in name and not hasattr(torch.optim, name):
        known = ", ".join(OPTIMIZERS)
        raise UserError(f"--optimizer-type {name}: not known. Use one of {known}, or module.Class.")
    path, arguments = OPTIMIZERS.get(key, (own, {}))
    module, _, attribute = path.rpartition(".")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        package = PACKAGES.get(module.partition(".")[0])
        remedy = f"install it with: pip install {package}" if package else "check the name"
        raise UserError(f"--optimizer-type {name}: {path} cannot be imported ({error}); {remedy}.") from error
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise UserError(f"--optimizer-type {name}: {path} is not a torch optimizer.")
    return found, arguments


def make_optimizer(
    name: str, groups: Sequence[Mapping[str, Any]], *, arguments: Mapping[str, Value]
) -> Optimizer:
    """The optimizer `name` over parameter groups that hold `params` and `lr`.

    Raises UserError for arguments that the class does not know or accept, and for Prodigy with several rates.
    """
    optimizer, own = class_of(name)
    if optimizer.__name__ == "Prodigy" and len({group["lr"] for group in groups}) > 1:
        raise UserError(
            "--optimizer-type prodigy finds one learning rate for all: leave out loraplus_lr_ratio and lr_patterns of "
            "--network-args, or take another optimizer."
        )
    if "lr" in arguments:
        raise UserError(
            "--optimizer-args: lr is --learning-rate (and lr_patterns of --network-args). Give it there."
        )
    try:
        made = optimizer([dict(group) for group in groups], **{**own, **arguments})
    except (TypeError, ValueError, RuntimeError) as error:
        known = [key for key in inspect.signature(optimizer).parameters if key != "params"]
        raise UserError(f"--optimizer-args: {error}. {name} takes {', '.join(known)}.") from error
    if hasattr(made, "train"):
        made.train()
    return made


@contextmanager
def evaluation_weights(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within, parameters are those to be used, not those that gradients are taken at.

    They differ for schedule-free optimizers only. Afterwards every bit is as before: going there and back through
    the optimizer alone would leave rounding errors.
    """
    if not hasattr(optimizer, "eval"):
        yield
        return
    kept = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
