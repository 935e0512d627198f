"""Prompt embeddings against diffusers' pipeline, on the same weights and tokenizers."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from kontext.checkpoints import load_clip, load_clip_tokenizer, load_t5, load_t5_tokenizer
from kontext.errors import UserError
from kontext.model.text import encode_clip, encode_t5
from tests.compare import relative_error

CPU = {"device": "cpu", "dtype": torch.float32}
PROMPTS = ["make the red circle blue", "", "turn it into a " + "very " * 60 + "big square, please remove 7"]


@pytest.fixture(scope="module")
def encoders(tiny_files):
    return SimpleNamespace(
        t5=load_t5(tiny_files.t5, **CPU),
        t5_tokenizer=load_t5_tokenizer(None, tiny_files.t5),
        clip=load_clip(tiny_files.clip, **CPU),
        clip_tokenizer=load_clip_tokenizer(None, tiny_files.clip),
    )


@pytest.fixture(scope="module")
def pipeline(tiny_files):
    from diffusers import FluxKontextPipeline

    return FluxKontextPipeline.from_pretrained(tiny_files.pipeline)


@pytest.mark.parametrize("length", [16, 512])
@torch.no_grad()
def test_t5(encoders, pipeline, length):
    found = encode_t5(encoders.t5, encoders.t5_tokenizer, PROMPTS, max_length=length)
    expected = pipeline._get_t5_prompt_embeds(PROMPTS, max_sequence_length=length)
    assert found.shape == (3, length, 32) and not found.requires_grad
    assert relative_error(found, expected) < 1e-5


def test_t5_length_is_512_by_default(encoders):
    assert encode_t5(encoders.t5, encoders.t5_tokenizer, ["a"]).shape == (1, 512, 32)


def test_t5_attends_to_padding(encoders):
    """No mask: the same words in a longer frame have other embeddings, as FLUX was trained."""
    short = encode_t5(encoders.t5, encoders.t5_tokenizer, ["make it blue"], max_length=8)
    long = encode_t5(encoders.t5, encoders.t5_tokenizer, ["make it blue"], max_length=32)
    assert relative_error(long[:, :4], short[:, :4]) > 1e-2


@torch.no_grad()
def test_clip(encoders, pipeline):
    found = encode_clip(encoders.clip, encoders.clip_tokenizer, PROMPTS)
    assert found.shape == (3, 24) and not found.requires_grad
    assert relative_error(found, pipeline._get_clip_prompt_embeds(PROMPTS)) < 1e-5


def test_one_text_at_a_time_is_the_same(encoders):
    together = encode_clip(encoders.clip, encoders.clip_tokenizer, PROMPTS)
    alone = torch.cat([encode_clip(encoders.clip, encoders.clip_tokenizer, [prompt]) for prompt in PROMPTS])
    assert relative_error(together, alone) < 1e-5


def test_the_tokenizer_of_another_model_is_an_error(encoders):
    with pytest.raises(
        UserError, match=r"gives token 5\d\d, but the text encoder knows 55: they do not belong"
    ):
        encode_t5(encoders.t5, encoders.clip_tokenizer, ["make it red"])


def test_clip_pools_at_the_end_of_text_whatever_its_id(tiny_files, encoders):
    """Its id need not be the highest of the vocabulary, as transformers assumes for old configs."""
    start, end, other = 60, 70, 200

    def tokenizer(texts, **_):
        ids = torch.full((2, 77), end)
        ids[:, 0], ids[0, 1:4], ids[1, 1:9] = start, other, other + 1
        return SimpleNamespace(input_ids=ids)

    tokenizer.eos_token_id = end
    pooled = encode_clip(encoders.clip, tokenizer, ["x", "y"])
    with torch.no_grad():
        hidden = encoders.clip(tokenizer([]).input_ids)
    assert torch.equal(pooled, torch.stack((hidden[0, 4], hidden[1, 9])))


def test_published_tokenizers_with_the_pipeline(tiny_files, tmp_path):
    """CLIP's real vocabulary: the pooled token is the first end of text."""
    folder = os.environ.get("KONTEXT_TEST_TOKENIZERS")
    if not folder:
        pytest.skip(
            "KONTEXT_TEST_TOKENIZERS does not name a folder with t5/ and clip/, the published tokenizers"
        )
    from transformers import CLIPTextConfig, CLIPTextModel

    from tests.tiny import randomise

    tokenizer = load_clip_tokenizer(Path(folder) / "clip", tiny_files.clip)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    ids = {"bos_token_id": 49406, "eos_token_id": 49407}
    model = randomise(
        CLIPTextModel(CLIPTextConfig(vocab_size=49408, hidden_act="quick_gelu", **sizes, **ids)), 0
    )
    with torch.no_grad():
        expected = model(
            **tokenizer(PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        )
    save_file(model.state_dict(), tmp_path / "clip.safetensors")
    found = encode_clip(load_clip(tmp_path / "clip.safetensors", **CPU), tokenizer, PROMPTS)
    assert relative_error(found, expected.pooler_output) < 1e-5
