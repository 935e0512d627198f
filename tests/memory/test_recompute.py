"""That recomputing changes no bit of training is tested in tests/training/test_loop.py."""

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from kontext.memory.recompute import recompute_blocks
from kontext.memory.remaking import remake_blocks
from kontext.model.transformer import Transformer
from kontext.training.network import Network, build
from tests.memory.live import Calls
from tests.memory.test_remaking import IMAGE, TOKENS, WIDTH, adapted, forward, gradients
from tests.training.world import CONFIG, small_transformer


def saved_bytes(recompute: bool) -> int:
    """What a forward pass keeps for the backward pass, weights aside."""
    model = small_transformer()
    build(model, Network(rank=4, alpha=4), seed=0)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    if recompute:
        recompute_blocks(model)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens, text = torch.randn(1, 256, CONFIG.in_channels), torch.randn(1, 8, CONFIG.context_width)
    vector, t = torch.randn(1, CONFIG.vector_width), torch.tensor([0.5])
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(tokens, torch.zeros(1, 256, 3), text, torch.zeros(1, 8, 3), t, vector, t)
    assert out.requires_grad
    return sum(kept.values())


def test_less_is_kept() -> None:
    assert saved_bytes(recompute=True) < 0.5 * saved_bytes(recompute=False)


def recomputed_whole(model: Transformer) -> None:
    """As training does it."""
    remake_blocks(model, "whole")
    recompute_blocks(model, "whole")


def operations(recompute: bool) -> tuple[int, int]:
    """Of the blocks in a forward pass, and of the backward pass."""
    model = adapted(double=1, single=1)
    if recompute:
        recomputed_whole(model)
    with FlopCounterMode(display=False) as counter:
        loss = forward(model).square().mean()
        counts = counter.get_flop_counts()
        in_blocks = sum(sum(counts[f"Transformer.{kind}_blocks.0"].values()) for kind in ("double", "single"))
        before = counter.get_total_flops()
        loss.backward()
    return in_blocks, counter.get_total_flops() - before


def test_the_products_that_end_a_block_are_computed_once() -> None:
    hidden = 4 * WIDTH
    double, single = TOKENS * hidden, IMAGE * (WIDTH + hidden)  # the last block is asked for the image alone
    (forth, plain), (_, recomputed) = operations(False), operations(True)
    assert recomputed - plain == forth - 2 * WIDTH * (double + single)


def test_nothing_is_computed_a_third_time() -> None:
    model = adapted(double=1, single=1)
    recomputed_whole(model)
    with Calls() as calls:
        gradients(model)
    norms, gelus, attentions = 2 * 2 + 2, 2 + 1, 2  # of a forward pass; the last block's text is normed apart
    outside = 1  # the final layer's norm
    assert calls["native_layer_norm"] == 2 * norms + outside
    assert calls["sigmoid_"] == 2 * gelus
    assert calls["_scaled_dot_product_flash_attention_for_cpu"] == 2 * attentions
