"""A small transformer of ours and its configuration, for the tests of this package."""

import torch
from torch import Tensor

from kontext.lora.deltas import LowRank
from kontext.model.transformer import FLUX, Transformer, TransformerConfig
from tests import tiny

CONFIG = TransformerConfig(
    in_channels=64,
    out_channels=64,
    context_width=tiny.CONTEXT_WIDTH,
    vector_width=tiny.VECTOR_WIDTH,
    width=tiny.WIDTH,
    heads=tiny.HEADS,
    mlp_width=4 * tiny.WIDTH,
    double_blocks=tiny.DOUBLE,
    single_blocks=tiny.SINGLE,
    axes=tiny.AXES,
    theta=10000.0,
    guidance=True,
)


def make_transformer(config: TransformerConfig = CONFIG, seed: int = 0) -> Transformer:
    return tiny.randomise(Transformer(config), seed)


def meta_transformer(config: TransformerConfig = FLUX) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def product(change: LowRank, x: Tensor) -> Tensor:
    """dW x of a vector (in,)."""
    out = torch.zeros(1, change.shape[0])
    change.add_product(x[None], 1.0, out)
    return out[0]
