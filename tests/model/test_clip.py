"""CLIP's text model against transformers'; whole files are compared in tests/checkpoints/test_text.py."""

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from kontext.model.clip import ClipConfig, ClipText
from tests.compare import relative_error


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_hidden_states(activation):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    theirs = CLIPTextConfig(vocab_size=50, max_position_embeddings=20, hidden_act=activation, **sizes)
    torch.manual_seed(0)
    expected = CLIPTextModel(theirs).eval()
    for parameter in expected.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    config = ClipConfig(50, 32, 48, layers=2, heads=4, length=20, activation=activation, eps=1e-5)
    ours = ClipText(config)
    ours.load_state_dict(
        {
            name.removeprefix("text_model."): value
            for name, value in expected.state_dict().items()
            if "position_ids" not in name
        }
    )
    ids = torch.randint(50, (2, 13))
    assert relative_error(ours(ids), expected(input_ids=ids).last_hidden_state) < 1e-5
