"""A model that lies partly on the host computes what one on the device does."""

import pytest
import torch

from kontext.checkpoints import load_transformer
from kontext.memory.modulation import HostModulation
from kontext.memory.placement import Placement
from kontext.memory.streaming import Streamed
from kontext.model.transformer import FLUX

CPU = torch.device("cpu")


def test_names_on_the_host_of_the_published_model():
    stays = Placement(swap=10, modulation=True).on_host(FLUX)
    # 10 is 5 double and 11 single blocks, evenly spread: every 3.8th and every 3.45th.
    doubles = [i for i in range(19) if stays(f"double_blocks.{i}.img_attn.qkv.weight")]
    singles = [i for i in range(38) if stays(f"single_blocks.{i}.linear1.bias")]
    assert doubles == [0, 3, 7, 11, 15]
    assert singles == [0, 3, 6, 10, 13, 17, 20, 24, 27, 31, 34]
    assert stays("double_blocks.1.img_mod.lin.weight") and stays("single_blocks.1.modulation.lin.bias")
    assert not any(
        stays(name) for name in ("img_in.weight", "final_layer.linear.weight", "time_in.in_layer.bias")
    )


def test_streamed_blocks_keep_their_modulation_unless_asked():
    stays = Placement(swap="max").on_host(FLUX)
    assert stays("double_blocks.0.txt_mlp.0.weight") and not stays("double_blocks.0.txt_mod.lin.weight")


@pytest.mark.parametrize("quantization", [None, "fp8_scaled"])
@pytest.mark.parametrize("placement", [Placement("max"), Placement(1, True), Placement(0, True)])
def test_same_digits_from_the_file(tiny_files, placement, quantization):
    def load(**where):
        return load_transformer(
            tiny_files.dit, device=CPU, dtype=torch.float32, quantization=quantization, **where
        )

    g = torch.Generator().manual_seed(0)
    model, config = load(), load().config
    inputs = (
        torch.randn(1, 8, config.in_channels, generator=g),
        torch.zeros(1, 8, 3),
        torch.randn(1, 4, config.context_width, generator=g),
        torch.zeros(1, 4, 3),
        torch.rand(1, generator=g),
        torch.randn(1, config.vector_width, generator=g),
        torch.ones(1),
    )
    placed = load(on_host=placement.on_host)
    placement.apply(placed, CPU)
    placement.apply(placed, CPU)
    with torch.no_grad():
        assert torch.equal(placed(*inputs), model(*inputs))
    assert any(isinstance(m, Streamed) for m in placed.modules()) == bool(placement.swap)
    assert any(isinstance(m, HostModulation) for m in placed.modules()) == placement.modulation
