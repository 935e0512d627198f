"""DoRA in training: a LoRA turns the rows of a weight, and their lengths are learned beside it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kontext.lora.adapted import Frozen, stretched_product
from kontext.lora.build import Misfit
from kontext.lora.deltas import Decomposed, Delta
from kontext.lora.linear import LoraLinear, plain_weight
from kontext.model.outputs import rows_of


class DoraLinear(LoraLinear):
    """m V x / |V| + bias with V = W0 + (alpha/r) B A, norms by row (Liu et al. 2024, arXiv:2402.09353).

    m is `dora_scale` (out, 1), at first |W0|. As in the paper's section 4.3, and in PEFT, no gradient flows through
    |V|. It is found without making V: |w + u|^2 = |w|^2 + 2 w.u + |u|^2, with u in the factors of the LoRA.
    """

    keeps_output = True
    units = 4

    def create(self, device: torch.device | str) -> None:
        super().create(device)
        norm = torch.linalg.vector_norm(plain_weight(self.base), dim=1, keepdim=True).to(device)
        self.dora_scale = nn.Parameter(norm.clone())
        self.register_buffer("base_norm", norm, persistent=False)

    def adapted(self, x: Tensor, rows: slice) -> Tensor:
        gain = (self.dora_scale / self.direction_norm(x.dtype)).squeeze(1)
        down, up = self.lora_down.weight, rows_of(self.lora_up.weight, rows)
        base = Frozen.of(self.base, rows)
        return stretched_product(x, base, down, up, self.scale, gain[rows], mask=self.mask(x))

    @torch.no_grad()
    def direction_norm(self, dtype: torch.dtype) -> Tensor:
        """|V| (out, 1), float32. dtype: what the base computes in."""
        down, up = self.lora_down.weight, self.lora_up.weight
        across = self._without_bias(self.base(down.to(dtype))).float().T
        along = up @ (down @ down.T)
        squares = (up * (2 * self.scale * across + self.scale**2 * along)).sum(1, keepdim=True)
        return (self.base_norm.square() + squares).clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    @torch.no_grad()
    def load(self, deltas: Sequence[Delta]) -> None:
        """Plain LoRAs are taken too: their change is kept."""
        super().load([_inner(delta) for delta in deltas])
        down, up = self.lora_down.weight, self.lora_up.weight
        direction = plain_weight(self.base).to(up.device).addmm(up, down, alpha=self.scale)
        self.dora_scale.copy_(torch.linalg.vector_norm(direction, dim=1, keepdim=True))
        for delta in deltas:
            if isinstance(delta.change, Decomposed):
                rows = slice(delta.target.start, delta.target.stop)
                self.dora_scale[rows] = delta.change.magnitude.to(self.dora_scale)

    def _without_bias(self, result: Tensor) -> Tensor:
        return result if self.base.bias is None else result - self.base.bias.to(result.dtype)


def _inner(delta: Delta) -> Delta:
    """The LoRA in a DoRA."""
    if not isinstance(delta.change, Decomposed):
        return delta
    if delta.change.magnitude.shape[1] != 1:
        raise Misfit("has lengths of columns there, and lengths of rows are trained here")
    return Delta(delta.target, delta.change.inner, delta.key)
