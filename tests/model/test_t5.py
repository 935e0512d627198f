"""T5's parts against transformers'; whole models are compared in tests/checkpoints/test_text.py."""

import pytest
import torch
from transformers import T5Config as TheirConfig
from transformers import T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Attention

from kontext.model.t5 import T5_XXL, T5Config, T5Encoder, distance_buckets
from tests.compare import relative_error

CONFIG = T5Config(
    vocab_size=50, width=32, mlp_width=64, blocks=2, heads=2, head_width=16, buckets=8, furthest=20, eps=1e-5
)


@pytest.mark.parametrize("buckets, furthest", [(32, 128), (8, 20), (16, 64)])
def test_distances_fall_into_the_same_buckets(buckets, furthest):
    places = torch.arange(512)
    expected = T5Attention._relative_position_bucket(
        places[None] - places[:, None], num_buckets=buckets, max_distance=furthest
    )
    assert torch.equal(distance_buckets(512, buckets, furthest), expected)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@torch.no_grad()
def test_hidden_states(dtype, bound):
    theirs = TheirConfig(
        vocab_size=50, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, relative_attention_num_buckets=8,
        relative_attention_max_distance=20, feed_forward_proj="gated-gelu", layer_norm_epsilon=1e-5,
    )  # fmt: skip
    torch.manual_seed(0)
    expected = T5EncoderModel(theirs).eval()
    for parameter in expected.parameters():
        parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    ours = T5Encoder(CONFIG)
    state = {name: value for name, value in expected.state_dict().items() if "embed_tokens" not in name}
    ours.load_state_dict(state)
    ids = torch.randint(50, (2, 40))
    assert relative_error(ours.to(dtype)(ids), expected(ids)[0]) < bound


def test_parameters_of_the_published_model():
    """4.76 billion: what Hugging Face shows for the encoder of google/t5-v1_1-xxl."""
    with torch.device("meta"):
        model = T5Encoder(T5_XXL)
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_762_310_656


def test_the_bias_lies_as_a_gpus_attention_asks():
    assert T5Encoder(CONFIG).bias(24).is_contiguous()
