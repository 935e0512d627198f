"""The state of a run in one file, from which it goes on as if it had never stopped.

`<name>-state/state.safetensors` holds the adapter's and the optimizer's tensors; everything else (step, settings,
the optimizer's structure) is JSON in its metadata. Nothing is pickled. The file appears complete or not at all.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from kontext.errors import UserError
from kontext.files import atomic_write
from kontext.lora.stream import Spec, Writer
from kontext.training.shares import Shares

FILE = "state.safetensors"
FORMAT = "kontext.training.1"
PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Progress:
    """Where a run stands, and what it must have in common with the run that goes on from there.

    step: how many are done. Epoch and place in the epoch follow from it, as the order of batches follows from the seed.
    settings: whatever changes the course of training, by the user's names for it.
    notes: what only the display and the report need, such as the smoothed loss.
    best: the lowest validation loss so far; unvalidated: a validation that was due after `step` was broken off.
    """

    step: int
    settings: Mapping[str, Any]
    scaler: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    best: float | None = None
    unvalidated: bool = False


def save_state(
    folder: Path,
    *,
    progress: Progress,
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    average: Mapping[str, Tensor] | None = None,
    shares: Shares | None = None,
    writes: bool = True,
) -> None:
    """Writes the state into `folder`, with the moving average of the parameters if there is one.

    shares: what this process holds of them, by default everything; writes: whether it is the one to write.

    Raises UserError if the optimizer keeps what is neither number nor tensor."""
    tensors: dict[str, Tensor] = {f"adapter.{name}": value for name, value in parameters.items()}
    tensors |= {f"average.{name}": value for name, value in (average or {}).items()}
    structure = _flatten(optimizer.state_dict(), "optimizer", tensors)
    metadata = {
        "format": FORMAT,
        "progress": json.dumps(asdict(progress), sort_keys=True),
        "optimizer": json.dumps(structure, separators=(",", ":")),
    }
    owned = _Owned(parameters, optimizer, shares or Shares())
    if not writes:
        for name, tensor in tensors.items():
            owned.whole(name, tensor)
        return
    specs = [Spec(name, tensor.dtype, tuple(owned.shape(name, tensor))) for name, tensor in tensors.items()]
    with atomic_write(folder / FILE) as temporary:
        writer = Writer(temporary, specs, metadata)
        for name, tensor in tensors.items():
            writer.put(name, owned.whole(name, tensor))


class _Owned:
    """Which tensors of a state are shared as a parameter is: the parameter, its average, moments of its shape."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, shares: Shares) -> None:
        self.parameters, self.shares = parameters, shares
        names = {id(parameter): name for name, parameter in parameters.items()}
        members = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._numbered = [names[id(parameter)] for parameter in members]

    def shape(self, name: str, tensor: Tensor) -> torch.Size:
        owner = self._owner(name, tensor.shape)
        return tensor.shape if owner is None else self.shares.shape(owner, tensor)

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        owner = self._owner(name, tensor.shape)
        return tensor if owner is None else self.shares.whole(owner, tensor)

    def own(self, name: str, tensor: Tensor) -> Tensor:
        """The inverse of `whole`."""
        owner = self._of(name)
        if owner is None or tensor.shape != self.shares.shape(owner, self.parameters[owner]):
            return tensor
        return self.shares.own(owner, tensor)

    def _owner(self, name: str, shape: torch.Size) -> str | None:
        owner = self._of(name)
        return owner if owner is not None and shape == self.parameters[owner].shape else None

    def _of(self, name: str) -> str | None:
        """The parameter that a name in a state file speaks of."""
        kind, _, rest = name.partition(".")
        if kind != "optimizer":
            return rest
        place = rest.split(".")
        return self._numbered[int(place[1])] if place[0] == "state" else None


def _flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, with its tensors moved to `tensors` under dotted names."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        items = [[key, _flatten(item, f"{name}.{key}", tensors)] for key, item in value.items()]
        return {"dict": items}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_flatten(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]}
    if isinstance(value, PLAIN):
        return value
    raise UserError(
        f"--save-state: this optimizer keeps a {type(value).__name__} ({name}), which cannot be saved safely. "
        "Use another optimizer, or leave out --save-state."
    )


def _restore(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `_flatten`."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _restore(item, tensors) for key, item in content}
    items = [_restore(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def read_progress(folder: Path) -> Progress:
    """Where the run in `folder` stood. Raises UserError if there is no complete state of this program."""
    try:
        with safe_open(folder / FILE, "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"--resume {folder}: no complete training state is in there ({error}).") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"--resume {folder}: this is not a training state of kontext ({FORMAT}).")
    return Progress(**json.loads(metadata["progress"]))


def load_state(
    folder: Path,
    *,
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    shares: Shares | None = None,
) -> dict[str, Tensor]:
    """Puts the weights and the optimizer's state back, and returns the moving average, empty if there was none.

    shares: as in `save_state`. Raises UserError if they are of another network.
    """
    shares = shares or Shares()
    owned = _Owned(parameters, optimizer, shares)
    with safe_open(folder / FILE, "pt") as file:
        names = list(file.keys())
        saved = {n.removeprefix("adapter."): file.get_slice(n) for n in names if n.startswith("adapter.")}
        wanted = {name: list(shares.shape(name, parameter)) for name, parameter in parameters.items()}
        _compare(folder, wanted, {name: values.get_shape() for name, values in saved.items()})
        tensors = {name: owned.own(name, file.get_tensor(name)) for name in names}
        structure = json.loads(file.metadata()["optimizer"])
    saved = _under("adapter.", tensors)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    _load_optimizer(optimizer, _restore(structure, tensors))
    return _under("average.", tensors)


def _load_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """As its own method does, but in the precision that was saved: torch takes that of the parameters instead, which for
    bfloat16 weights may be less than the optimizer keeps.
    """
    optimizer.load_state_dict(saved)
    members = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(members):
        kept = optimizer.state.get(parameter, {})
        for key, value in saved["state"].get(number, {}).items():
            if isinstance(value, Tensor) and value.dtype != kept[key].dtype:
                kept[key] = value.to(kept[key].device)


def check_network(folder: Path, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises UserError if the state in `folder` is of another network than these whole parameters, which may be on meta."""
    with safe_open(folder / FILE, "pt") as file:
        names = [name for name in list(file.keys()) if name.startswith("adapter.")]
        saved = {name.removeprefix("adapter."): file.get_slice(name).get_shape() for name in names}
    _compare(folder, {name: list(parameter.shape) for name, parameter in parameters.items()}, saved)


def _compare(folder: Path, wanted: Mapping[str, list[int]], saved: Mapping[str, list[int]]) -> None:
    if wanted != saved:
        raise UserError(
            f"--resume {folder}: the state is of another network: give the same --network options."
        )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Names of the settings that differ, with their values before and now."""
    now = json.loads(json.dumps(now))  # as they look after a round through the file
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return {name: (before.get(name), now.get(name)) for name in names}


def latest_state(folders: Iterable[Path]) -> Path | None:
    """Of the run that saved last, the complete state that has come furthest; torn ones count as absent.

    States of one run have equal settings, the seed among them. An earlier run of the same name, begun with others, may
    have come further.
    """
    found: list[tuple[Progress, Path]] = []
    for folder in folders:
        try:
            found.append((read_progress(folder), folder))
        except UserError:
            continue
    if not found:
        return None
    last, _ = max(found, key=lambda state: (state[1] / FILE).stat().st_mtime_ns)
    own = [(progress.step, folder) for progress, folder in found if progress.settings == last.settings]
    return max(own)[1]
