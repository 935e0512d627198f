"""The weights that adapted models act with, found by asking their linears."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kontext.model.transformer import Transformer
from tests.lora.models import make_transformer
from tests.lora.reference import (
    base_weights,
    bfl_weights,
    diffusers_model,
)


def our_model() -> Transformer:
    model = make_transformer()
    model.load_state_dict(base_weights())
    return model


@torch.no_grad()
def effective(model: Any, names: list[str]) -> dict[str, Tensor]:
    """Weights and biases that the linears of an adapted model act with, found by asking them."""
    weights = {}
    for name in names:
        linear = model.get_submodule(name)
        bias = linear(torch.zeros(1, linear.in_features))[0]
        weights[f"{name}.weight"] = (linear(torch.eye(linear.in_features)) - bias).T
        weights[f"{name}.bias"] = bias
    return weights


def adapted_bfl(model: Any, names: list[str]) -> dict[str, Tensor]:
    return base_weights() | effective(model, names)


class AsDiffusers(nn.Module):
    """Some weights of a diffusers model replaced, for `bfl_weights`."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.weights = {**diffusers_model().state_dict(), **weights}

    def state_dict(self) -> dict[str, Tensor]:
        return self.weights


def adapted_diffusers(model: Any, names: list[str]) -> dict[str, Tensor]:
    return bfl_weights(AsDiffusers(effective(model, names)))
