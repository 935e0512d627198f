"""The adapter in training: how it is built, and its parameters by name and by learning rate."""

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from kontext.errors import UserError
from kontext.lora.adapter import Size, linears, targets, wrap
from kontext.lora.dora import DoraLinear
from kontext.lora.files import AdapterFile
from kontext.lora.linear import AdapterLinear, LoraLinear
from kontext.lora.patterns import compile_patterns, left_by
from kontext.lora.products import LohaLinear, LokrLinear
from kontext.lora.sizes import sizes_in
from kontext.model.transformer import Transformer
from kontext.training.arguments import Value

Kind = Literal["lora", "dora", "loha", "lokr", "none"]
KINDS: dict[Kind, type[AdapterLinear]] = {
    "lora": LoraLinear, "dora": DoraLinear, "loha": LohaLinear, "lokr": LokrLinear,
}  # fmt: skip
# What musubi-tuner takes too, which says nothing of a transformer without convolutions.
MEANINGLESS = ("conv_dim", "conv_alpha", "verbose")
_PART = re.compile(
    r"\.(?:lora_\w+\.weight|(?:hada|lokr|dora)_\w+|weight|bias|scale)$"
)  # of a parameter's name
# The factor of each kind that starts at zero: what LoRA+ trains faster.
SECOND = ("lora_up.weight", "hada_w2_a", "lokr_w2", "lokr_w2_b")


@dataclass(frozen=True)
class Network:
    """A network of adapters, or none: then weights of the transformer are trained.

    plus_ratio: by how much the learning rate of the factor that starts at zero exceeds that of the others (LoRA+).
    factor: how LoKr splits a linear (see `factorise`).

    rank_patterns, rate_patterns: ranks and learning rates of the modules whose whole name a regex matches; the first
    that does counts. Alpha goes with the rank, so that all adapters act with one strength.
    """

    rank: int
    alpha: float
    kind: Kind = "lora"
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    include_patterns: tuple[str, ...] = ()
    exclude_patterns: tuple[str, ...] = ()
    plus_ratio: float = 1.0
    factor: int = -1
    rank_patterns: tuple[tuple[str, int], ...] = ()
    rate_patterns: tuple[tuple[str, float], ...] = ()

    @property
    def make(self) -> Callable[..., AdapterLinear]:
        """The class of adapter with all that its linears share."""
        more = {"factor": self.factor} if self.kind == "lokr" else {}
        return partial(
            KINDS[self.kind],
            dropout=self.dropout,
            rank_dropout=self.rank_dropout,
            module_dropout=self.module_dropout,
            **more,
        )


def network_of(
    rank: int, alpha: float | None, dropout: float, arguments: Mapping[str, Value], kind: Kind = "lora"
) -> Network:
    """The network that the options describe, `arguments` being those of `--network-args`.

    Raises UserError for an argument that is unknown, of the wrong type, or not for this kind of network.
    """
    readers: dict[str, tuple[str, Callable[[str, Value], Any]]] = {
        "rank_dropout": ("rank_dropout", _share),
        "module_dropout": ("module_dropout", _share),
        "include_patterns": ("include_patterns", _patterns),
        "exclude_patterns": ("exclude_patterns", _patterns),
        "loraplus_lr_ratio": ("plus_ratio", _positive),
        "factor": ("factor", _factor),
        "rank_patterns": ("rank_patterns", _ranks),
        "lr_patterns": ("rate_patterns", _rates),
        "dora": ("dora", _flag),
        "dora_wd": ("dora", _flag),
    }
    if kind == "none":
        readers = {key: readers[key] for key in ("include_patterns", "exclude_patterns", "lr_patterns")}
    fields: dict[str, Any] = {}
    for key, value in arguments.items():
        if key in MEANINGLESS:
            continue
        if key not in readers:
            raise UserError(f"--network-args: {key} is not known. Known are {', '.join(readers)}.")
        field, read = readers[key]
        fields[field] = read(key, value)
    if "factor" in fields and kind != "lokr":
        raise UserError("--network-args: factor is for --network-module lokr.")
    if fields.pop("dora", False):
        if kind != "lora":
            raise UserError("--network-args: dora is for --network-module lora.")
        kind = "dora"
    return Network(rank, rank if alpha is None else alpha, kind, dropout, **fields)


def _flag(key: str, value: Value) -> bool:
    words = {"true": True, "1": True, "false": False, "0": False}
    if str(value).lower() not in words:
        raise UserError(f"--network-args: {key} must be true or false, not {value!r}.")
    return words[str(value).lower()]


def _factor(key: str, value: Value) -> int:
    if not isinstance(value, int) or value < -1 or value == 0:
        raise UserError(f"--network-args: {key} must be a whole number above 0, or -1, not {value!r}.")
    return value


def _share(key: str, value: Value) -> float:
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise UserError(f"--network-args: {key} must be a number from 0 to below 1, not {value!r}.")
    return float(value)


def _positive(key: str, value: Value) -> float:
    if not isinstance(value, int | float) or value <= 0:
        raise UserError(f"--network-args: {key} must be a number above 0, not {value!r}.")
    return float(value)


def _patterns(key: str, value: Value) -> tuple[str, ...]:
    """One regex, or a list of them."""
    patterns = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise UserError(f"--network-args: {key} must be a regex or a list of regexes, not {value!r}.")
    return patterns


def _ranks(key: str, value: Value) -> tuple[tuple[str, int], ...]:
    found = _by_pattern(key, value)
    if not all(isinstance(rank, int) and rank > 0 for _, rank in found):
        raise UserError(f"--network-args: the ranks in {key} must be whole numbers above 0, not {value!r}.")
    return found


def _rates(key: str, value: Value) -> tuple[tuple[str, float], ...]:
    return tuple((pattern, _positive(key, rate)) for pattern, rate in _by_pattern(key, value))


def _by_pattern(key: str, value: Value) -> tuple[tuple[str, Any], ...]:
    """`regex=number`, a list of them, or a dictionary."""
    if isinstance(value, dict):
        return tuple(value.items())
    words = [word.rpartition("=") for word in _patterns(key, value)]
    try:
        return tuple((pattern.strip(), ast.literal_eval(number.strip())) for pattern, _, number in words)
    except (ValueError, SyntaxError) as error:
        raise UserError(
            f"--network-args: {key} must be regex=number, or a list of them, not {value!r}."
        ) from error


def sizes_of(network: Network, names: Sequence[str]) -> dict[str, Size]:
    """The size of the adapter of each module. Raises UserError for a pattern that matches none."""
    ranks = _matched(network.rank_patterns, names, "rank_patterns")
    strength = network.alpha / network.rank
    return {
        name: Size(ranks[name], strength * ranks[name])
        if name in ranks
        else Size(network.rank, network.alpha)
        for name in names
    }


def _matched(patterns: Sequence[tuple[str, float]], names: Sequence[str], argument: str) -> dict[str, Any]:
    """{name: value of the first pattern that matches it}, for the names that one does."""
    compiled = compile_patterns(pattern for pattern, _ in patterns)
    for pattern in compiled:
        if not any(pattern.fullmatch(name) for name in names):
            raise UserError(
                f"--network-args: {pattern.pattern!r} in {argument} matches no trained module. "
                "Patterns must match a whole name such as double_blocks.0.img_attn.qkv."
            )
    values = [value for _, value in patterns]
    found = {
        name: next((v for p, v in zip(compiled, values, strict=True) if p.fullmatch(name)), None)
        for name in names
    }
    return {name: value for name, value in found.items() if value is not None}


def build(
    transformer: Transformer,
    network: Network,
    *,
    seed: int,
    device: torch.device | None = None,
    like: AdapterFile | None = None,
) -> dict[str, AdapterLinear]:
    """Attaches a fresh network to the transformer, which it freezes; the adapters by module name.

    device: where adapters live, if not beside the weights, which may wait on the host. like: an adapter whose modules,
    ranks and alphas are taken instead of the network's.
    """
    include, exclude = network.include_patterns, network.exclude_patterns
    if like is None:
        names = targets(transformer, include_patterns=include, exclude_patterns=exclude)
    else:
        names = left_by(exclude, include, [name for name, _ in linears(transformer)])
    sizes = sizes_of(network, names) if like is None else sizes_in(like, transformer, names)
    if network.kind != "lokr":  # a file of another kind is refused when it is loaded
        sizes = {name: replace(size, factor=None) for name, size in sizes.items()}
    return wrap(transformer, sizes, seed=seed, make=network.make, device=device)


def parameters_of(modules: Mapping[str, AdapterLinear]) -> dict[str, nn.Parameter]:
    """What is trained, by name."""
    return {
        f"{name}.{part}": parameter
        for name, module in modules.items()
        for part, parameter in module.learned.items()
    }


def groups_of(
    parameters: Mapping[str, nn.Parameter],
    *,
    rate: float,
    plus_ratio: float,
    patterns: Sequence[tuple[str, float]] = (),
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, one for each learning rate: with LoRA+ there are two.

    patterns: (regex of module names, learning rate). Raises UserError for one that matches no module.
    """
    owners = {name: _PART.sub("", name) for name in parameters}
    rates = _matched(patterns, list(owners.values()), "lr_patterns")
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        own = rates.get(owners[name], rate) * (plus_ratio if name.endswith(SECOND) else 1)
        groups.setdefault(own, []).append(parameter)
    return [{"params": members, "lr": own} for own, members in groups.items()]
