"""Loading T5 and CLIP: every layout must compute what transformers computes from its own folder."""

from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file

from kontext.checkpoints import load_clip, load_t5
from kontext.errors import UserError
from kontext.quant import FP8, QuantisedLinear
from tests.compare import relative_error

CPU = {"device": "cpu", "dtype": torch.float32}
IDS = torch.tensor([[4, 5, 6, 9, 1, 0, 0, 0], [7, 8, 3, 20, 21, 22, 1, 0]])


@pytest.fixture(scope="module")
def t5(tiny_files):
    from transformers import T5EncoderModel

    return T5EncoderModel.from_pretrained(tiny_files.pipeline / "text_encoder_2")


@pytest.fixture(scope="module")
def clip(tiny_files):
    from transformers import CLIPTextModel

    return CLIPTextModel.from_pretrained(tiny_files.pipeline / "text_encoder")


@pytest.fixture(scope="module")
def clip_ids(clip):
    start, end = clip.config.bos_token_id, clip.config.eos_token_id
    ids = torch.full((2, 77), end)
    ids[:, 0], ids[0, 1:5], ids[1, 1:20] = start, torch.arange(4) + 60, torch.arange(19) + 80
    return ids


@torch.no_grad()
def hidden(model, ids):
    """Of a model of ours, or of transformers."""
    out = model(ids)
    return out if isinstance(out, torch.Tensor) else out[0]


@pytest.mark.parametrize("layout", ["t5", "t5_sharded", "pipeline"])
def test_every_t5_layout(tiny_files, t5, layout):
    model = load_t5(getattr(tiny_files, layout), **CPU)
    assert relative_error(hidden(model, IDS), hidden(t5, IDS)) < 1e-5


def test_t5_configuration_from_shapes(tiny_files, t5):
    found, expected = load_t5(tiny_files.t5, **CPU).config, t5.config
    names = {
        "vocab_size": "vocab_size", "width": "d_model", "head_width": "d_kv", "mlp_width": "d_ff", "blocks": "num_layers",
        "heads": "num_heads", "buckets": "relative_attention_num_buckets", "furthest": "relative_attention_max_distance",
        "eps": "layer_norm_epsilon",
    }  # fmt: skip
    assert asdict(found) == {ours: getattr(expected, theirs) for ours, theirs in names.items()}
    assert (expected.dense_act_fn, expected.is_gated_act) == ("gelu_new", True)


def test_t5_is_frozen_and_its_embedding_is_kept_once(tiny_files):
    model = load_t5(tiny_files.t5, **CPU)
    assert not any("embed_tokens" in name for name in model.state_dict())
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())


def test_t5_with_a_decoder_and_spare_tensors(tiny_files, t5, tmp_path):
    state = load_file(tiny_files.t5)
    state["decoder.block.0.layer.0.SelfAttention.q.weight"] = torch.ones(32, 32)
    state["lm_head.weight"] = torch.ones(60, 32)
    state["encoder.embed_tokens.weight"] = state["shared.weight"].clone()
    state["spiece_model"] = torch.zeros(7, dtype=torch.uint8)
    save_file(state, tmp_path / "t5.safetensors")
    model = load_t5(tmp_path / "t5.safetensors", **CPU)
    assert relative_error(hidden(model, IDS), hidden(t5, IDS)) < 1e-5


def test_t5_with_its_embedding_under_the_other_name(tiny_files, t5, tmp_path):
    state = load_file(tiny_files.t5)
    state["encoder.embed_tokens.weight"] = state.pop("shared.weight")
    save_file(state, tmp_path / "t5.safetensors")
    model = load_t5(tmp_path / "t5.safetensors", **CPU)
    assert relative_error(hidden(model, IDS), hidden(t5, IDS)) < 1e-5


def is_linear(name):
    return "SelfAttention" in name and "bias" not in name or "DenseReluDense" in name


@pytest.mark.parametrize("fp8", [False, True])
def test_t5_files_in_scaled_fp8(tiny_files, t5, tmp_path, capsys, fp8):
    state, out = load_file(tiny_files.t5), {"scaled_fp8": torch.zeros(0, dtype=FP8)}
    for name, value in state.items():
        if is_linear(name):
            scale = value.abs().max() / 448
            out[name], out[name.replace(".weight", ".scale_weight")] = (value / scale).to(FP8), scale
        else:
            out[name] = value
    save_file(out, tmp_path / "t5.safetensors")
    model = load_t5(tmp_path / "t5.safetensors", fp8=fp8, **CPU)
    difference = hidden(model, IDS) - hidden(t5, IDS)
    assert 1e-4 < difference.norm() / hidden(t5, IDS).norm() < 5e-2
    said = " ".join(capsys.readouterr().err.split())
    told = (
        "14 weights are in 8 bits there, and take 4 times the memory here. --fp8-t5 keeps them as they are."
    )
    assert (told in said) == (not fp8), said


def test_t5_in_fp8_is_close_and_small(tiny_files, t5):
    model = load_t5(tiny_files.t5, fp8=True, **CPU)
    linears = {name for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}
    assert len(linears) == 14 and "encoder.block.1.layer.1.DenseReluDense.wo" in linears
    difference = hidden(model, IDS) - hidden(t5, IDS)
    assert 1e-4 < difference.norm() / hidden(t5, IDS).norm() < 3e-2


def test_t5_in_float16_keeps_the_overflowing_linear_in_float32(tiny_files):
    model = load_t5(tiny_files.t5, device="cpu", dtype=torch.float16)
    wide = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert wide == {f"encoder.block.{i}.layer.1.DenseReluDense.wo.weight" for i in range(2)}


@pytest.mark.parametrize("layout", ["clip", "pipeline"])
def test_every_clip_layout(tiny_files, clip, clip_ids, layout):
    model = load_clip(getattr(tiny_files, layout), **CPU)
    assert relative_error(hidden(model, clip_ids), hidden(clip, clip_ids)) < 1e-5


def test_clip_with_spare_tensors_and_without_prefix(tiny_files, clip, clip_ids, tmp_path):
    state = {name.removeprefix("text_model."): value for name, value in load_file(tiny_files.clip).items()}
    state["embeddings.position_ids"] = torch.arange(77)[None]
    state["text_projection.weight"] = torch.ones(24, 24)
    state["logit_scale"] = torch.ones(())
    save_file(state, tmp_path / "clip.safetensors")
    model = load_clip(tmp_path / "clip.safetensors", **CPU)
    assert relative_error(hidden(model, clip_ids), hidden(clip, clip_ids)) < 1e-5


def test_clip_heads_and_activation():
    """The published model: 768 channels, 12 heads, 12 layers."""
    from pathlib import Path

    from kontext.checkpoints.source import Entry, Source
    from kontext.checkpoints.text import _clip_config

    shapes = {
        "text_model.embeddings.token_embedding.weight": (49408, 768),
        "text_model.embeddings.position_embedding.weight": (77, 768),
        "text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768),
        "text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
    }
    entries = {name: Entry(Path("x"), name, shape, torch.float32, 0) for name, shape in shapes.items()}
    config = _clip_config(Source(Path("x"), entries, {}, {}))
    assert asdict(config) == {
        "vocab_size": 49408, "width": 768, "mlp_width": 3072, "layers": 12, "heads": 12, "length": 77,
        "activation": "quick_gelu", "eps": 1e-5,
    }  # fmt: skip
    text = {"hidden_act": "gelu", "num_attention_heads": 8, "layer_norm_eps": 1e-6}
    whole = _clip_config(Source(Path("x"), entries, {}, {"text_config": text, "hidden_act": "no"}))
    assert (whole.activation, whole.heads, whole.eps) == ("gelu", 8, 1e-6)
    with pytest.raises(UserError, match="hidden_act swish in config.json is not known"):
        _clip_config(Source(Path("x"), entries, {}, {"hidden_act": "swish"}))


@pytest.mark.parametrize(
    ("load", "file", "key"),
    [
        (load_t5, "t5", "encoder.final_layer_norm.weight"),
        (load_clip, "clip", "text_model.final_layer_norm.bias"),
    ],
)
def test_missing_tensors_are_named(tiny_files, tmp_path, load, file, key):
    state = load_file(getattr(tiny_files, file))
    del state[key]
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=f"1 missing: {key}"):
        load(tmp_path / "x.safetensors", **CPU)
