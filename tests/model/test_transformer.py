"""The transformer's parts against diffusers' and plain formulas. Whole models: tests/checkpoints."""

import pytest
import torch
from safetensors.torch import load_file

from kontext.checkpoints import load_transformer
from kontext.model.latents import position_ids
from kontext.model.transformer import Transformer, TransformerConfig, sinusoid
from tests.compare import relative_error
from tests.tiny import CONTEXT_WIDTH, VECTOR_WIDTH


@pytest.fixture(scope="module")
def model(tiny_files):
    return load_transformer(tiny_files.dit, device="cpu", dtype=torch.float32)


def inputs(batch=2, targets=6, references=4):
    """Keyword arguments of a forward pass: targets of 2 x 3 tokens, references of 2 x 2."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.cat((position_ids(2, targets // 2), position_ids(2, references // 2, index=1)))
    return {
        "img": torch.randn(batch, targets + references, 64, generator=generator),
        "img_ids": ids[None],
        "txt": torch.randn(batch, 5, CONTEXT_WIDTH, generator=generator),
        "txt_ids": torch.zeros(1, 5, 3),
        "t": torch.linspace(0.1, 0.9, batch),
        "vector": torch.randn(batch, VECTOR_WIDTH, generator=generator),
        "guidance": torch.full((batch,), 2.5),
    }


def test_parameter_names_are_the_checkpoints(tiny_files, model):
    assert set(model.state_dict()) == set(load_file(tiny_files.dit))


def test_parameters_of_the_published_model():
    """FLUX.1 Kontext [dev] has 11,901,408,320 parameters."""
    config = TransformerConfig(64, 64, 4096, 768, 3072, 24, 12288, 19, 38, (16, 56, 56), 10_000.0, True)
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == 11_901_408_320
    assert model.single_blocks[37].linear1.weight.shape == (21504, 3072)


def test_sinusoid_is_diffusers():
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0.0, 0.1234, 1.0])
    expected = get_timestep_embedding(t * 1000, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(sinusoid(t), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_samples_of_a_batch_do_not_mix(model):
    x = inputs(batch=3)
    together = model(**x)
    for i in range(3):
        alone = model(**{name: v[i : i + 1] if len(v) == 3 else v for name, v in x.items()})
        assert relative_error(alone, together[i : i + 1]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["img", "txt", "t", "vector", "guidance", "img_ids"])
def test_every_input_counts(model, name):
    x = inputs()
    changed = x[name].clone()
    changed[..., -1] += 0.5
    assert relative_error(model(**{**x, name: changed}), model(**x)) > 1e-4


@torch.no_grad()
def test_the_order_of_text_tokens_is_free_of_positions(model):
    """Text ids are all zero: only which tokens there are counts, not their order."""
    x = inputs()
    assert relative_error(model(**{**x, "txt": x["txt"].flip(1)}), model(**x)) < 1e-5


@torch.no_grad()
def test_references_shape_the_target(model):
    x = inputs()
    changed = x["img"].clone()
    changed[:, 6:] += 1
    assert relative_error(model(**{**x, "img": changed})[:, :6], model(**x)[:, :6]) > 1e-3


def test_bfloat16_is_close(tiny_files, model):
    half = load_transformer(tiny_files.dit, device="cpu", dtype=torch.bfloat16)
    x = inputs(batch=1)
    low = {name: v if "ids" in name or name in ("t", "guidance") else v.bfloat16() for name, v in x.items()}
    with torch.no_grad():
        expected, found = model(**x), half(**low)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() / expected.norm() < 0.03


@torch.no_grad()
def test_the_last_block_computes_target_tokens_alone(model):
    """As if every token were computed; of 5 text, 6 target and 4 reference tokens only the targets ask at the end."""
    x, asked = inputs(), []
    last = model.single_blocks[-1]
    plain = last.attend
    last.attend = lambda q, k, v: asked.append((q.shape[2], k.shape[2])) or plain(q, k, v)
    (mods,) = model.modulations([model.condition(x["t"], x["vector"], x["guidance"])])
    img, txt, pe = model.img_in(x["img"]), model.txt_in(x["txt"]), model.positions(x["txt_ids"], x["img_ids"])
    try:
        found = model.trunk(img, txt, pe, mods, targets=6)
    finally:
        last.attend = plain
    for block, mod in zip(model.double_blocks, mods.blocks[:2], strict=True):
        img, txt = block(img, txt, mod, pe)
    tokens = torch.cat((txt, img), 1)
    for block, mod in zip(model.single_blocks, mods.blocks[2:], strict=True):
        tokens = block(tokens, mod, pe)
    expected = model.final_layer(tokens[:, 5:11], mods.vec)
    assert asked == [(6, 15)] and found.shape == expected.shape
    assert relative_error(found, expected) < 1e-6
