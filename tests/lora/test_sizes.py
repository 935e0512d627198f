import dataclasses
from pathlib import Path

import torch
from lycoris import LycorisNetwork, create_lycoris

from kontext.lora.adapter import attach
from kontext.lora.files import save_lora
from kontext.lora.sizes import config_for
from kontext.model.transformer import FLUX
from tests.lora.models import CONFIG, make_transformer, meta_transformer
from tests.lora.reference import diffusers_model, save


def test_the_real_model_is_told_from_any_of_its_layers(tmp_path: Path):
    only = {"include_patterns": [r"single_blocks\.30\.linear2"], "exclude_patterns": [".*"]}
    save_lora(
        tmp_path / "a.safetensors", attach(meta_transformer(), rank=1, alpha=1, seed=0, device="cpu", **only)
    )
    assert config_for([tmp_path / "a.safetensors"]) == FLUX


def test_a_small_model(tmp_path: Path):
    save_lora(tmp_path / "a.safetensors", attach(make_transformer(), rank=3, alpha=1, seed=0))
    found = config_for([tmp_path / "a.safetensors"])
    wanted = ("width", "mlp_width", "double_blocks", "single_blocks")
    assert [getattr(found, name) for name in wanted] == [getattr(CONFIG, name) for name in wanted]


def test_kronecker_and_hadamard_factors_tell_it_too(tmp_path: Path):
    for algo in ("lokr", "loha"):
        LycorisNetwork.apply_preset({"lora_prefix": "lycoris", "target_module": ["Linear"]})
        network = create_lycoris(diffusers_model(), 1.0, linear_dim=2, algo=algo, factor=4)
        network.apply_to()
        path = save(tmp_path / f"{algo}.safetensors", network.state_dict())
        assert config_for([path]).width == CONFIG.width


def test_without_blocks_it_is_the_published_one(tmp_path: Path):
    tensors = {"img_in.lora_A.weight": torch.zeros(1, 64), "img_in.lora_B.weight": torch.zeros(3072, 1)}
    assert dataclasses.astuple(config_for([save(tmp_path / "a.safetensors", tensors)]))[4] == 3072
