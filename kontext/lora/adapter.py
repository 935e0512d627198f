"""LoRA for training: which linears get one, and the module that holds it.

A linear is anything with `in_features` and `out_features`, so that quantised layers take adapters too.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kontext.errors import UserError
from kontext.lora.patterns import compile_patterns, matches_any

DEFAULT_EXCLUDE = (
    r"(?!(double|single)_blocks\.).*",
    r".*_mod\.lin",
    r".*modulation\.lin",
    r".*norm.*",
)


class LoraLinear(nn.Module):
    """W0 x + (alpha/r) B A x, for a frozen linear W0 (Hu et al. 2021, arXiv:2106.09685).

    A is `lora_down` (r, in), B is `lora_up` (out, r): float32 whatever the base is, cast to x's dtype in the
    forward pass. B starts at zero, so a new adapter changes nothing; A is drawn by `attach`.

    dropout zeroes activations between A and B, rank_dropout whole ranks of a sample, module_dropout skips the
    adapter. All three draw from torch's global generators, in training mode only.
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        device = device or base.weight.device
        options = {"bias": False, "device": device, "dtype": torch.float32}
        self.lora_down = nn.utils.skip_init(nn.Linear, base.in_features, rank, **options)
        self.lora_up = nn.utils.skip_init(nn.Linear, rank, base.out_features, **options)
        nn.init.zeros_(self.lora_up.weight)
        self.alpha = alpha
        self.dropout, self.rank_dropout, self.module_dropout = dropout, rank_dropout, module_dropout

    @property
    def rank(self) -> int:
        return self.lora_down.out_features

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def weight(self) -> Tensor:
        """The base's weight: what asks a linear for its device and dtype sees no difference."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        if self.training and self.module_dropout and torch.rand(()) < self.module_dropout:
            return self.base(x)
        hidden = F.linear(x, self.lora_down.weight.to(x.dtype))
        if self.training:
            hidden = self._drop(hidden)
        return self.base(x) + self.scale * F.linear(hidden, self.lora_up.weight.to(x.dtype))

    def _drop(self, hidden: Tensor) -> Tensor:
        """hidden (B, ..., r): what is kept is scaled up, so that the mean stays."""
        hidden = F.dropout(hidden, self.dropout)
        if not self.rank_dropout:
            return hidden
        kept = torch.rand(hidden.shape[0], hidden.shape[-1], device=hidden.device) >= self.rank_dropout
        kept = kept.view(kept.shape[0], *[1] * (hidden.ndim - 2), kept.shape[1])
        return hidden * kept / (1 - self.rank_dropout)


def attach(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    seed: int,
    dropout: float = 0.0,
    rank_dropout: float = 0.0,
    module_dropout: float = 0.0,
    include_patterns: Sequence[str] = (),
    exclude_patterns: Sequence[str] = (),
    device: torch.device | str | None = None,
) -> dict[str, LoraLinear]:
    """Put a LoRA around every targeted linear of `model` and return them by dotted name, in model order.

    The whole model is frozen; only the adapters ask for gradients. The first weights depend on `seed`, the
    rank and the list of targets alone, not on the device. They live on `device`, by default the base's.

    Raises UserError when a pattern is no regular expression or no linear is left.
    """
    model.requires_grad_(False)
    names = targets(model, include_patterns=include_patterns, exclude_patterns=exclude_patterns)
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name in names:
        module = LoraLinear(
            model.get_submodule(name),
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            rank_dropout=rank_dropout,
            module_dropout=module_dropout,
            device=device,
        )
        _draw(module.lora_down.weight, generator)
        model.set_submodule(name, module)
        modules[name] = module
    return modules


def targets(
    model: nn.Module, *, include_patterns: Sequence[str] = (), exclude_patterns: Sequence[str] = ()
) -> list[str]:
    """Dotted names of the linears to adapt: those of the blocks, without modulation and norms.

    Patterns are regular expressions that must match a whole name. `exclude_patterns` add to the default
    exclusion; a name that `include_patterns` match is taken whatever excludes it.
    """
    exclude = compile_patterns((*DEFAULT_EXCLUDE, *exclude_patterns))
    include = compile_patterns(include_patterns)
    names = [n for n, _ in linears(model) if matches_any(include, n) or not matches_any(exclude, n)]
    if not names:
        raise UserError(
            "No layer is left to train: the exclude patterns match all of them. "
            "Patterns must match a whole name such as double_blocks.0.img_attn.qkv."
        )
    return names


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(dotted name, module) of everything linear, in model order."""
    for name, module in model.named_modules():
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            yield name, module


def _draw(weight: Tensor, generator: torch.Generator) -> None:
    """Kaiming-uniform with a = sqrt(5), drawn on the CPU: uniform within 1/sqrt(in)."""
    values = nn.init.kaiming_uniform_(torch.empty(weight.shape), a=5**0.5, generator=generator)
    with torch.no_grad():
        weight.copy_(values)
