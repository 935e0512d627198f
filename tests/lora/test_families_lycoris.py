"""Files of lycoris: LoRA, LoHa, LoKr, DoRA and full differences, on both layouts' names."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lycoris import LycorisNetwork, create_lycoris
from torch import nn

from tests.lora.effective import adapted_bfl, adapted_diffusers, our_model
from tests.lora.reference import (
    assert_same_change,
    base_weights,
    diffusers_model,
    merged_by_us,
    randomise_adapter,
    read,
    renamed,
    save,
)

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
