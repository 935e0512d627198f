"""Every family of adapter files, against what makes it or reads it elsewhere: peft, lycoris, diffusers."""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxKontextPipeline
from lycoris import LycorisNetwork, create_lycoris
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from kontext.errors import UserError
from kontext.lora.files import read_adapter, save_lora
from kontext.model.transformer import Transformer
from tests.lora.models import CONFIG, KONTEXT, make_transformer, relative_error
from tests.lora.reference import (
    BFL_MODULES,
    DIFFUSERS_MODULES,
    assert_same_change,
    base_weights,
    bfl_weights,
    diffusers_model,
    merged_by_us,
    randomise_adapter,
    read,
    renamed,
    save,
)
from tests.lora.test_files import full_size_names, fused, peft_model, trained_modules


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


# ---- lycoris ----

LYCORIS = {
    "lora": {"algo": "lora"},
    "loha": {"algo": "loha"},
    "lokr": {"algo": "lokr", "factor": 4},
    "lokr-balanced": {"algo": "lokr"},
    "lokr-both": {"algo": "lokr", "decompose_both": True, "linear_dim": 1},
    "lokr-full": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "dora-out": {"algo": "lora", "dora_wd": True},
    "dora-in": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    "loha-dora": {"algo": "loha", "dora_wd": True},
    "lokr-dora": {"algo": "lokr", "factor": 4, "dora_wd": True},
    "full": {"algo": "full"},
}
KINDS = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "full": "full difference"}


@pytest.fixture(autouse=True)
def quiet_lycoris() -> Iterator[None]:
    """lycoris keeps its settings on the class; set them back."""
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    yield
    LycorisNetwork.apply_preset({"lora_prefix": "lycoris", "target_module": ["Linear"], "exclude_name": []})


def lycoris(model: nn.Module, prefix: str, **settings: Any) -> LycorisNetwork:
    """A random lycoris network around the linears of `model`. Its scale is sqrt(rank), no round number."""
    LycorisNetwork.apply_preset({"lora_prefix": prefix, "target_module": ["Linear"]})
    network = create_lycoris(model, 1.0, **{"linear_dim": 3, "linear_alpha": 2} | settings)
    network.apply_to()
    randomise_adapter(network)
    return network


def linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("kind", LYCORIS)
def test_lycoris_on_diffusers_names(tmp_path: Path, kind: str):
    model = diffusers_model()
    names = linears(model)
    network = lycoris(model, "lycoris", **LYCORIS[kind])
    adapter = read(save(tmp_path / "a.safetensors", network.state_dict()))
    assert adapter.family == "LyCORIS" and not adapter.unmatched
    assert adapter.kinds == (["DoRA"] if "dora" in kind else [KINDS[kind.split("-")[0]]])
    assert (
        assert_same_change(merged_by_us(adapter), adapted_diffusers(model, names)) >= len(base_weights()) / 3
    )


@pytest.mark.parametrize("prefix", ["lycoris", "lora_unet"])
@pytest.mark.parametrize("kind", LYCORIS)
def test_lycoris_on_bfl_names(tmp_path: Path, kind: str, prefix: str):
    """lora_unet is what musubi-tuner and ComfyUI's own trainer call LoHa and LoKr on the fused layers."""
    model = our_model()
    names = linears(model)
    network = lycoris(model, prefix, **LYCORIS[kind])
    adapter = read(save(tmp_path / "a.safetensors", network.state_dict()))
    assert adapter.family == ("LyCORIS" if prefix == "lycoris" else "kohya/musubi") and not adapter.unmatched
    assert len(adapter.modules) == len(names)
    assert_same_change(merged_by_us(adapter), adapted_bfl(model, names))


@pytest.mark.parametrize("kind", ["loha", "lokr", "dora-out"])
@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model.", ""])
def test_dotted_names_with_lycoris_parts(tmp_path: Path, kind: str, prefix: str):
    """ai-toolkit and SimpleTuner write `transformer.<dotted name>.lokr_w1`."""
    model = diffusers_model()
    names = linears(model)
    network = lycoris(model, "lycoris", **LYCORIS[kind])
    dotted = {"lycoris_" + name.replace(".", "_"): prefix + name for name in names}

    def rename(key: str) -> str:
        stem, _, part = key.partition(".")
        return f"{dotted[stem]}.{part}"

    adapter = read(save(tmp_path / "a.safetensors", renamed(network.state_dict(), rename)))
    assert not adapter.unmatched
    assert_same_change(merged_by_us(adapter), adapted_diffusers(model, names))


def test_lokr_without_alpha_has_scale_one(tmp_path: Path):
    model = diffusers_model()
    names = linears(model)
    network = lycoris(model, "lycoris", algo="lokr", factor=4, linear_alpha=3)
    tensors = {k: v for k, v in network.state_dict().items() if not k.endswith("alpha")}
    adapter = read(save(tmp_path / "a.safetensors", tensors))
    assert_same_change(merged_by_us(adapter), adapted_diffusers(model, names))


# ---- peft, on BFL names: fal, and plain dotted files ----

PEFT = {
    "lora": lambda **k: LoraConfig(r=4, lora_alpha=6, **k),
    "rslora": lambda **k: LoraConfig(r=4, lora_alpha=6, use_rslora=True, **k),
    "dora": lambda **k: LoraConfig(r=4, lora_alpha=6, use_dora=True, **k),
    "bias": lambda **k: LoraConfig(r=4, lora_alpha=6, lora_bias=True, **k),
    "loha": lambda **k: LoHaConfig(r=4, alpha=6, **k),
    "lokr": lambda **k: LoKrConfig(r=4, alpha=6, decompose_factor=4, **k),
}


def peft_ours(kind: str, names: list[str] = BFL_MODULES) -> Any:
    model = get_peft_model(our_model(), PEFT[kind](target_modules=names))
    randomise_adapter(model)
    return model


@pytest.mark.parametrize("kind", PEFT)
def test_a_peft_folder(tmp_path: Path, kind: str):
    """`save_pretrained`: alpha stands in adapter_config.json."""
    model = peft_ours(kind)
    model.save_pretrained(tmp_path)
    adapter = read(tmp_path)
    assert adapter.family == "fal" and not adapter.unmatched
    expected = adapted_bfl(model.get_base_model(), BFL_MODULES)
    assert assert_same_change(merged_by_us(adapter), expected) >= len(BFL_MODULES)


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model.", "base_model.model."])
@pytest.mark.parametrize("down", ["lora_A", "lora_down"])
def test_dotted_bfl_names(tmp_path: Path, prefix: str, down: str):
    model = peft_ours("lora")
    up = {"lora_A": "lora_B", "lora_down": "lora_up"}[down]

    def rename(key: str) -> str:
        stem = key.removeprefix("base_model.model.").replace("lora_A", down)
        return prefix + stem.replace("lora_B", up)

    tensors = renamed(get_peft_model_state_dict(model), rename)
    tensors |= {f"{prefix}{name}.alpha": torch.tensor(6.0) for name in BFL_MODULES}
    adapter = read(save(tmp_path / "a.safetensors", tensors))
    assert adapter.family == ("fal" if prefix.startswith("base") else "BFL names") and not adapter.unmatched
    assert_same_change(merged_by_us(adapter), adapted_bfl(model.get_base_model(), BFL_MODULES))


def test_half_dotted_names_of_musubis_converter(tmp_path: Path):
    """`convert_lora.py --target other` leaves underscores: diffusion_model.double_blocks.0.img_attn_qkv."""
    save_lora(tmp_path / "a.safetensors", modules := trained_modules())

    def rename(key: str) -> str:
        blocks, _, rest = key.removeprefix("lora_unet_").partition("_blocks_")
        index, _, name = rest.partition("_")
        name = name.replace("lora_down", "lora_A").replace("lora_up", "lora_B")
        return f"diffusion_model.{blocks}_blocks.{index}.{name}"

    adapter = read(save(tmp_path / "b.safetensors", renamed(load_file(tmp_path / "a.safetensors"), rename)))
    assert len(adapter.modules) == len(modules) and not adapter.unmatched
    assert_same_change(merged_by_us(adapter), merged_by_us(read(tmp_path / "a.safetensors")))


def test_fal_at_full_size_is_read_alike_by_diffusers(tmp_path: Path):
    """diffusers wants every module of the real model, modulation and final layer too."""
    generator = torch.Generator().manual_seed(0)
    shapes = {n: (o, i) for n, (o, i) in full_size_shapes().items()}
    tensors = {}
    for name, (rows, columns) in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(1, columns, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, 1, generator=generator)
    path = save(tmp_path / "a.safetensors", tensors)
    theirs = FluxKontextPipeline.lora_state_dict(path)
    adapter = read_adapter(path, KONTEXT)
    assert adapter.family == "fal" and len(adapter.modules) == len(shapes)
    names = full_size_names() | {"final_layer.linear": ["proj_out"]}
    for i in range(19):
        names[f"double_blocks.{i}.img_mod.lin"] = [f"transformer_blocks.{i}.norm1.linear"]
        names[f"double_blocks.{i}.txt_mod.lin"] = [f"transformer_blocks.{i}.norm1_context.linear"]
    for i in range(38):
        names[f"single_blocks.{i}.modulation.lin"] = [f"single_transformer_blocks.{i}.norm.linear"]
    x = torch.randn(15360, generator=generator)
    for bfl, parts in names.items():
        downs = [theirs.pop(f"transformer.{n}.lora_A.weight") for n in parts]
        ups = [theirs.pop(f"transformer.{n}.lora_B.weight") for n in parts]
        expected = torch.cat([b @ (a @ x[: a.shape[1]]) for a, b in zip(downs, ups, strict=True)])
        (delta,) = adapter.deltas[f"{bfl}.weight"]
        assert relative_error(delta.change.apply(x[: delta.change.shape[1]]), expected) < 1e-5
    assert not theirs


def full_size_shapes() -> dict[str, tuple[int, int]]:
    shapes = {"final_layer.linear": (64, 3072)}
    for i in range(19):
        for s in ("img", "txt"):
            b = f"double_blocks.{i}.{s}"
            shapes |= {f"{b}_attn.qkv": (9216, 3072), f"{b}_attn.proj": (3072, 3072)}
            shapes |= {
                f"{b}_mlp.0": (12288, 3072),
                f"{b}_mlp.2": (3072, 12288),
                f"{b}_mod.lin": (18432, 3072),
            }
    for i in range(38):
        b = f"single_blocks.{i}"
        shapes |= {f"{b}.linear1": (21504, 3072), f"{b}.linear2": (3072, 15360)}
        shapes |= {f"{b}.modulation.lin": (9216, 3072)}
    return shapes


# ---- diffusers' names in other spellings ----


def flat(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PEFT keys in kohya's spelling."""
    out = {}
    for key, tensor in tensors.items():
        stem, _, part = key.partition(".lora_")
        part = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[part]
        out[f"{prefix}{stem.replace('.', '_')}.{part}"] = tensor
        out[f"{prefix}{stem.replace('.', '_')}.alpha"] = torch.tensor(6.0)
    return out


@pytest.mark.parametrize(
    ("prefix", "family"),
    [
        ("lora_unet_", "kohya with diffusers names"),
        ("lora_transformer_", "OneTrainer"),
        ("lycoris_", "LyCORIS"),
    ],
)
def test_flattened_diffusers_names(tmp_path: Path, prefix: str, family: str):
    model = peft_model(lora_alpha=6)
    adapter = read(save(tmp_path / "a.safetensors", flat(prefix, get_peft_model_state_dict(model))))
    assert adapter.family == family and not adapter.unmatched
    assert_same_change(merged_by_us(adapter), fused(model))


def test_onetrainer_is_read_alike_by_diffusers(tmp_path: Path):
    """Of a block's modules, diffusers' converter knows the attention ones only."""
    names = [n for n in DIFFUSERS_MODULES if ".attn." in n or "blocks" not in n]
    model = diffusers_model()
    model.add_adapter(
        LoraConfig(r=4, lora_alpha=6, target_modules="|".join(n.replace(".", r"\.") for n in names))
    )
    randomise_adapter(model)
    tensors = flat("lora_transformer_", get_peft_model_state_dict(model))
    tensors["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.zeros(1, 4)
    tensors["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"] = torch.zeros(4, 1)
    tensors["lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha"] = torch.tensor(1.0)
    path = save(tmp_path / "a.safetensors", tensors)
    adapter = read(path)
    assert len(adapter.skipped) == 3
    other = diffusers_model()
    other.load_lora_adapter(FluxKontextPipeline.lora_state_dict(path), prefix="transformer")
    assert_same_change(merged_by_us(adapter), fused(other))


def xlabs(prefix: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    width = CONFIG.width
    shapes = {
        f"double_blocks.{i}.processor.qkv_lora{s}": (3 * width, width) for i in range(2) for s in (1, 2)
    }
    shapes |= {f"double_blocks.{i}.processor.proj_lora{s}": (width, width) for i in range(2) for s in (1, 2)}
    shapes |= {"single_blocks.1.processor.qkv_lora": (3 * width, width)}
    shapes |= {"single_blocks.0.processor.proj_lora": (width, 5 * width)}
    tensors = {}
    for name, (rows, columns) in shapes.items():
        tensors[f"{prefix}{name}.down.weight"] = torch.randn(4, columns, generator=generator)
        tensors[f"{prefix}{name}.up.weight"] = torch.randn(rows, 4, generator=generator)
    return tensors


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_xlabs_is_read_alike_by_diffusers(tmp_path: Path, prefix: str):
    path = save(tmp_path / "a.safetensors", xlabs(prefix))
    adapter = read(path)
    assert adapter.family == "XLabs" and len(adapter.modules) == 10 and not adapter.unmatched
    model = diffusers_model()
    model.load_lora_adapter(FluxKontextPipeline.lora_state_dict(path), prefix="transformer")
    assert assert_same_change(merged_by_us(adapter), fused(model)) == 10


def test_an_xlabs_projection_of_the_attention_alone(tmp_path: Path):
    """linear2 reads attention and MLP; the adapter's inputs are the attention's, the first ones."""
    stem = "single_blocks.0.processor.proj_lora"
    down, up = torch.randn(4, CONFIG.width), torch.randn(CONFIG.width, 4)
    tensors = {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
    merged = merged_by_us(read(save(tmp_path / "a.safetensors", tensors)))
    expected = base_weights()
    expected["single_blocks.0.linear2.weight"][:, : CONFIG.width] += up @ down
    assert_same_change(merged, expected)


# ---- DoRA, full differences, norms ----


def test_dora_of_peft_on_diffusers_names(tmp_path: Path):
    model = peft_model(use_dora=True)
    tensors = {f"transformer.{k}": v for k, v in get_peft_model_state_dict(model).items()}
    assert any("lora_magnitude_vector" in k for k in tensors)
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 6})}
    expected = fused(model)
    adapter = read(save(tmp_path / "a.safetensors", tensors, metadata))
    assert adapter.kinds == ["DoRA"] and not adapter.unmatched
    assert_same_change(merged_by_us(adapter), expected)

    def aitoolkit(key: str) -> str:
        return key.replace("lora_magnitude_vector.weight", "magnitude").replace(
            "lora_magnitude_vector", "magnitude"
        )

    adapter = read(save(tmp_path / "b.safetensors", renamed(tensors, aitoolkit), metadata))
    assert adapter.kinds == ["DoRA"] and not adapter.unmatched
    assert_same_change(merged_by_us(adapter), expected)


@pytest.mark.parametrize("prefix", ["diffusion_model.", ""])
def test_full_differences_and_norms(tmp_path: Path, prefix: str):
    """ComfyUI's spellings: .diff, .diff_b, .w_norm and .set_weight; a norm by its module or its tensor."""
    weights = base_weights()
    block = "double_blocks.0"
    tensors = {
        f"{block}.img_attn.qkv.diff": torch.randn(192, 64),
        f"{block}.img_attn.qkv.diff_b": torch.randn(192),
        f"{block}.txt_mlp.2.set_weight": torch.randn(64, 256),
        f"{block}.img_attn.norm.query_norm.w_norm": torch.randn(32),
        f"{block}.img_attn.norm.key_norm.scale.diff": torch.randn(32),
        "single_blocks.1.norm.key_norm.scale.set_weight": torch.randn(32),
    }
    expected = weights | {
        f"{block}.img_attn.qkv.weight": weights[f"{block}.img_attn.qkv.weight"]
        + tensors[f"{block}.img_attn.qkv.diff"],
        f"{block}.img_attn.qkv.bias": weights[f"{block}.img_attn.qkv.bias"]
        + tensors[f"{block}.img_attn.qkv.diff_b"],
        f"{block}.txt_mlp.2.weight": tensors[f"{block}.txt_mlp.2.set_weight"],
        f"{block}.img_attn.norm.query_norm.scale": weights[f"{block}.img_attn.norm.query_norm.scale"]
        + tensors[f"{block}.img_attn.norm.query_norm.w_norm"],
        f"{block}.img_attn.norm.key_norm.scale": weights[f"{block}.img_attn.norm.key_norm.scale"]
        + tensors[f"{block}.img_attn.norm.key_norm.scale.diff"],
        "single_blocks.1.norm.key_norm.scale": tensors["single_blocks.1.norm.key_norm.scale.set_weight"],
    }
    adapter = read(save(tmp_path / "a.safetensors", renamed(tensors, lambda k: prefix + k)))
    assert adapter.kinds == ["full difference"] and not adapter.unmatched
    assert assert_same_change(merged_by_us(adapter), expected) == 6


def test_an_adapter_stored_twice_counts_once(tmp_path: Path):
    model = peft_model(lora_alpha=6)
    tensors = get_peft_model_state_dict(model)
    twice = flat("lora_unet_", tensors) | {f"transformer.{k}": v.clone() for k, v in tensors.items()}
    twice |= {
        f"transformer.{n.removesuffix('.lora_A.weight')}.alpha": torch.tensor(6.0)
        for n in tensors
        if "_A." in n
    }
    adapter = read(save(tmp_path / "a.safetensors", twice))
    assert_same_change(merged_by_us(adapter), fused(model))
    assert len(adapter.unmatched) == 3 * len(tensors) / 2


# ---- refusals ----


def tiny_lora(stem: str, rows: int = 64, columns: int = 64) -> dict[str, Tensor]:
    down, up = torch.randn(4, columns), torch.randn(rows, 4)
    return {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}


FOREIGN = {
    "Stable Diffusion XL": "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q",
    "Stable Diffusion (UNet)": "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    "Stable Diffusion 3": "lora_unet_joint_blocks_0_x_block_attn_qkv",
    "HunyuanVideo": "lora_unet_double_blocks_0_img_mlp_fc1",
    "Qwen-Image": "transformer.transformer_blocks.0.img_mlp.net.0.proj",
    "FLUX.2": "diffusion_model.double_stream_modulation_img.lin",
    "Wan": "lora_unet_blocks_0_self_attn_q",
    "Z-Image or Lumina": "diffusion_model.layers.0.attention.to_q",
    "LTX-Video, PixArt or CogVideoX": "transformer.transformer_blocks.0.attn1.to_q",
    "HiDream": "diffusion_model.double_stream_blocks.0.block.attn1.to_q",
}


@pytest.mark.parametrize("architecture", FOREIGN)
def test_a_lora_for_another_architecture_is_named_as_such(tmp_path: Path, architecture: str):
    path = save(tmp_path / "a.safetensors", tiny_lora(FOREIGN[architecture]))
    with pytest.raises(UserError) as caught:
        read(path)
    assert f"is an adapter for {architecture}, not for FLUX.1 Kontext" in str(caught.value)


def test_hunyuan_video_is_found_out_though_its_attention_has_our_names(tmp_path: Path):
    path = save(tmp_path / "a.safetensors", tiny_lora("lora_unet_double_blocks_19_img_attn_proj"))
    with pytest.raises(UserError, match="another model, with more blocks: block 19 in .* has 2"):
        read(path)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv.oft_blocks", "OFT"),
        ("base_model.model.double_blocks.0.img_attn.qkv.oft_R.weight", "OFT"),
        ("lycoris_transformer_blocks_0_attn_to_q.a1.weight", "GLoRA"),
        ("lycoris_transformer_blocks_0_attn_to_q.on_input", "IA3"),
    ],
)
def test_what_is_no_sum_is_refused(tmp_path: Path, key: str, kind: str):
    path = save(
        tmp_path / "a.safetensors", {key: torch.zeros(2, 4, 4), "lora_unet_x.alpha": torch.tensor(1.0)}
    )
    with pytest.raises(UserError, match=f"is an? {kind} adapter"):
        read(path)


@pytest.mark.parametrize("stem", ["img_in", "transformer.x_embedder"])
def test_control_loras_are_refused(tmp_path: Path, stem: str):
    path = save(tmp_path / "a.safetensors", tiny_lora(stem, columns=128))
    with pytest.raises(UserError, match="control LoRA .* 128 channels. Kontext has 64"):
        read(path)
