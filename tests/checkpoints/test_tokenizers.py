"""Where tokenizers are looked for, and what is said when there is none."""

import os
import shutil
from pathlib import Path

import pytest

from kontext.checkpoints import load_clip_tokenizer, load_t5_tokenizer
from kontext.errors import UserError

PROMPTS = ["Make the red circle BLUE.", "  turn it into a square,\nplease", ""]


def test_from_folders(tiny_files):
    t5 = load_t5_tokenizer(tiny_files.t5_tokenizer, tiny_files.t5)
    clip = load_clip_tokenizer(tiny_files.clip_tokenizer, tiny_files.clip)
    assert t5(["make the red"]).input_ids == [[4, 5, 6, 1]]
    assert clip(["the"]).input_ids == [[516, 515, 517]]


@pytest.mark.parametrize("weights", ["t5", "pipeline"])
def test_beside_the_weights(tiny_files, weights):
    assert len(load_t5_tokenizer(None, getattr(tiny_files, weights))) == 55
    assert len(load_clip_tokenizer(None, getattr(tiny_files, weights))) == 518


def test_beside_a_component_of_a_pipeline(tiny_files):
    assert len(load_t5_tokenizer(None, tiny_files.pipeline / "text_encoder_2")) == 55
    assert len(load_clip_tokenizer(None, tiny_files.pipeline / "text_encoder")) == 518


def test_the_other_tokenizer_is_refused(tiny_files):
    with pytest.raises(UserError, match="--tokenizer1: .*clip_tokenizer holds no T5 tokenizer"):
        load_t5_tokenizer(tiny_files.clip_tokenizer, tiny_files.t5)
    with pytest.raises(
        UserError, match="--tokenizer2: .*t5_tokenizer holds no CLIP tokenizer .*vocab.json and"
    ):
        load_clip_tokenizer(tiny_files.t5_tokenizer, tiny_files.clip)


def test_a_missing_folder(tiny_files, tmp_path):
    with pytest.raises(UserError, match="--tokenizer1: there is no folder .*nowhere"):
        load_t5_tokenizer(tmp_path / "nowhere", tiny_files.t5)


def test_a_broken_tokenizer(tiny_files, tmp_path):
    (tmp_path / "vocab.json").write_text("{")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(UserError, match="The CLIP tokenizer in .* cannot be read"):
        load_clip_tokenizer(tmp_path, tiny_files.clip)


@pytest.mark.parametrize(
    ("load", "cls", "hub", "flag"),
    [
        (load_t5_tokenizer, "T5TokenizerFast", "google/t5-v1_1-xxl", "--tokenizer1"),
        (load_clip_tokenizer, "CLIPTokenizerFast", "openai/clip-vit-large-patch14", "--tokenizer2"),
    ],
)
def test_offline_says_what_to_download(tiny_files, tmp_path, monkeypatch, load, cls, hub, flag):
    import transformers

    asked = []

    def offline(name):
        asked.append(name)
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    monkeypatch.setattr(getattr(transformers, cls), "from_pretrained", offline)
    weights = shutil.copy(tiny_files.t5, tmp_path / "alone.safetensors")
    with pytest.raises(UserError, match=f"https://huggingface.co/{hub}. Download .* pass {flag} FOLDER"):
        load(None, weights)
    assert asked == [hub]


@pytest.fixture(scope="module")
def real_tokenizers():
    folder = os.environ.get("KONTEXT_TEST_TOKENIZERS")
    if not folder:
        pytest.skip(
            "KONTEXT_TEST_TOKENIZERS does not name a folder with t5/ and clip/, the published tokenizers"
        )
    return Path(folder)


def test_the_published_t5_tokenizer(real_tokenizers):
    """Against the tokenizers library alone, which reads the same file."""
    from tokenizers import Tokenizer

    ours = load_t5_tokenizer(real_tokenizers / "t5", "x")
    reference = Tokenizer.from_file(str(real_tokenizers / "t5" / "tokenizer.json"))
    assert ours(PROMPTS).input_ids == [reference.encode(prompt).ids for prompt in PROMPTS]
    assert ours(["Make it blue."]).input_ids == [[1796, 34, 1692, 5, 1]]


def test_the_published_clip_tokenizer(real_tokenizers):
    ours = load_clip_tokenizer(real_tokenizers / "clip", "x")
    assert ours(["a photo of a cat"]).input_ids == [[49406, 320, 1125, 539, 320, 2368, 49407]]
    assert ours.eos_token_id == ours.pad_token_id == len(ours) - 1
