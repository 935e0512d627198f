"""A limit on how much adapters change their linears: `--scale-weight-norms` (max-norm regularisation, as in sd-scripts)."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kontext.lora.dora import DoraLinear
from kontext.lora.linear import AdapterLinear, LoraLinear
from kontext.lora.products import LohaLinear, LokrLinear


def has_norm(module: AdapterLinear) -> bool:
    """A DoRA turns a weight and sets its length: there is no change beside the weight to be measured."""
    return isinstance(module, LoraLinear | LohaLinear | LokrLinear) and not isinstance(module, DoraLinear)


def factors_of(module: AdapterLinear) -> Sequence[Tensor]:
    """What the change of a module is a product of."""
    if isinstance(module, LoraLinear):
        return module.lora_up.weight, module.lora_down.weight
    if isinstance(module, LohaLinear):
        return module.factors
    assert isinstance(module, LokrLinear)
    return module.lokr_w1, *module.second


def norm_of(module: AdapterLinear) -> Tensor:
    """|scale dW|, the root of the sum of squares, in float32."""
    if isinstance(module, LohaLinear):
        a, b, c, d = module.factors
        return abs(module.scale) * ((a @ b) * (c @ d)).norm()
    if isinstance(module, LokrLinear):
        second = module.second[0].norm() if module.full else product_norm(*module.second)
        return abs(module.scale) * module.lokr_w1.norm() * second  # |kron(A, B)| = |A| |B|
    assert isinstance(module, LoraLinear)
    return abs(module.scale) * product_norm(module.lora_up.weight, module.lora_down.weight)


def product_norm(a: Tensor, b: Tensor) -> Tensor:
    """|A B| of A (m, r) and B (r, n) without making it: |A B|^2 = sum of (A^T A) o (B B^T), two matrices (r, r)."""
    return ((a.T @ a) * (b @ b.T)).sum().clamp_min(0).sqrt()


class Limit:
    """Called after an optimizer step: scales the factors of every module whose change exceeds `most` down to it.

    norms (modules,) are those before scaling, of the last step. Nothing is read from the device.
    """

    def __init__(self, modules: Mapping[str, AdapterLinear], most: float) -> None:
        assert all(has_norm(module) for module in modules.values())
        self.modules = list(modules.values())
        self.most = most
        self.norms: Tensor | None = None

    @torch.no_grad()
    def __call__(self) -> None:
        norms = []
        for module in self.modules:
            norm, factors = norm_of(module), factors_of(module)
            share = (self.most / norm).clamp_max(1) ** (1 / len(factors))
            for factor in factors:
                factor.mul_(share)
            norms.append(norm)
        self.norms = torch.stack(norms)

    def measures(self) -> dict[str, float]:
        """Of the last step, by sd-scripts' names: how many modules were scaled, and the mean and largest norm then."""
        if self.norms is None:
            return {}
        kept = self.norms.clamp_max(self.most)
        scaled, mean, largest = torch.stack(
            [(self.norms > self.most).sum(), kept.mean(), kept.max()]
        ).tolist()
        return {
            "max_norm/keys_scaled": math.floor(scaled),
            "max_norm/average_key_norm": mean,
            "max_norm/max_key_norm": largest,
        }
