"""Adapters in training: a module that holds a frozen linear and what is learned beside it.

A linear is anything with `in_features` and `out_features`, so that quantised layers take adapters too. What is
learned is float32 whatever the base is, and is cast to x's dtype in the forward pass.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kontext.lora.adapted import Frozen, low_rank_product
from kontext.lora.build import Misfit
from kontext.lora.deltas import Delta
from kontext.lora.fuse import fuse
from kontext.model.outputs import ALL, rows_of, some_outputs
from kontext.quant import QuantisedLinear

OTHER_KIND = (
    "is no {} there. Set --network-module (and dora=true of --network-args for a DoRA) to the file's kind"
)


class AdapterLinear(nn.Module):
    """W0 x + scale * dW x for a frozen linear W0, where scale = alpha / rank; kinds differ in dW.

    dropout zeroes single activations, rank_dropout whole columns of them for a sample (ranks in a LoRA, outputs
    elsewhere), module_dropout skips the adapter. All three draw from torch's global generators, in training mode
    only.

    The names of its parameters, without those of `base`, are the parts' names in a file of kohya or LyCORIS.

    Of memory, for `memory.estimate`: whether autograd keeps its output; the most tensors of the weight's size that its
    backward pass makes; and what a block's pass takes for it beside these, in units.
    """

    keeps_output: ClassVar[bool] = False
    dense: ClassVar[int] = 0
    units: ClassVar[int] = 0

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int,
        alpha: float,
        device: torch.device | str | None = None,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
    ) -> None:
        """device: of what is learned; by default the base's."""
        super().__init__()
        self.base = base.requires_grad_(False)
        self.rank, self.alpha = rank, alpha
        self.dropout, self.rank_dropout, self.module_dropout = dropout, rank_dropout, module_dropout
        self.create(device or base.weight.device)

    def create(self, device: torch.device | str) -> None:
        """Make the parameters."""
        raise NotImplementedError

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def weight(self) -> Tensor:
        """The base's weight: what asks a linear for its device and dtype sees no difference."""
        return self.base.weight

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """What is trained, by the name of its part in a file."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("base.")}

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        return self.some_outputs(x, ALL)

    def some_outputs(self, x: Tensor, rows: slice) -> Tensor:
        """Those of `forward` that these rows of the weight make. Dropout is drawn for each call."""
        if self.training and self.module_dropout and torch.rand(()) < self.module_dropout:
            return some_outputs(self.base, x, rows)
        return self.adapted(x, rows)

    def adapted(self, x: Tensor, rows: slice) -> Tensor:
        change = self.change(x)[..., rows]
        return some_outputs(self.base, x, rows).add_(change, alpha=self.scale)

    def change(self, x: Tensor) -> Tensor:
        """dW x."""
        raise NotImplementedError

    def draw(self, generator: torch.Generator) -> None:
        """The first weights, from the CPU's `generator`: such that a new adapter changes nothing."""
        raise NotImplementedError

    def load(self, deltas: Sequence[Delta]) -> None:
        """Take the weights of `deltas`, at this module's own alpha: the change is then the same.

        Raises Misfit when they are of another kind or rank.
        """
        raise NotImplementedError

    def dropped(self, hidden: Tensor) -> Tensor:
        """hidden (B, ..., n) after dropout: what is kept is scaled up, so that the mean stays."""
        if not self.training:
            return hidden
        hidden = F.dropout(hidden, self.dropout)
        if not self.rank_dropout:
            return hidden
        kept = torch.rand(hidden.shape[0], hidden.shape[-1], device=hidden.device) >= self.rank_dropout
        kept = kept.view(kept.shape[0], *[1] * (hidden.ndim - 2), kept.shape[1])
        return hidden * kept / (1 - self.rank_dropout)


class LoraLinear(AdapterLinear):
    """W0 x + (alpha/r) B A x (Hu et al. 2021, arXiv:2106.09685).

    A is `lora_down` (r, in), B is `lora_up` (out, r) and starts at zero.
    """

    def create(self, device: torch.device | str) -> None:
        options = {"bias": False, "device": device, "dtype": torch.float32}
        self.lora_down = nn.utils.skip_init(nn.Linear, self.base.in_features, self.rank, **options)
        self.lora_up = nn.utils.skip_init(nn.Linear, self.rank, self.base.out_features, **options)
        nn.init.zeros_(self.lora_up.weight)

    def adapted(self, x: Tensor, rows: slice) -> Tensor:
        down, up = self.lora_down.weight, rows_of(self.lora_up.weight, rows)
        return low_rank_product(x, Frozen.of(self.base, rows), down, up, self.scale, mask=self.mask(x))

    def mask(self, x: Tensor) -> Tensor | None:
        """What dropout multiplies A x (..., r) by: 0, or enough that the mean stays."""
        if not (self.training and (self.dropout or self.rank_dropout)):
            return None
        return self.dropped(x.new_ones(*x.shape[:-1], self.rank))

    def draw(self, generator: torch.Generator) -> None:
        draw_uniform(self.lora_down.weight, generator)

    @torch.no_grad()
    def load(self, deltas: Sequence[Delta]) -> None:
        factors = fuse(deltas, self.base.out_features)
        if factors is None:
            raise Misfit(OTHER_KIND.format("LoRA"))
        if factors.rank != self.rank:
            raise Misfit(
                f"has rank {factors.rank} there and {self.rank} here. Set --network-dim to the file's rank"
            )
        self.lora_down.weight.copy_(factors.down)
        self.lora_up.weight.copy_(factors.up.float() * (factors.scale / self.scale))


def draw_uniform(weight: Tensor, generator: torch.Generator) -> None:
    """Kaiming-uniform with a = sqrt(5), drawn on the CPU: uniform within 1/sqrt(columns)."""
    values = nn.init.kaiming_uniform_(torch.empty(weight.shape), a=5**0.5, generator=generator)
    with torch.no_grad():
        weight.copy_(values)


def draw_normal(weight: Tensor, deviation: float, generator: torch.Generator) -> None:
    """Normal with mean 0, drawn on the CPU."""
    values = deviation * torch.randn(weight.shape, generator=generator)
    with torch.no_grad():
        weight.copy_(values)


def plain_weight(base: nn.Module) -> Tensor:
    """The weight (out, in) that a linear of any kind acts with, in float32."""
    if isinstance(base, QuantisedLinear):
        return base.dequantised(torch.float32)
    return base.weight.detach().float()
