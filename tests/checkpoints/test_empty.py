"""Models of files without their numbers: shaped and refused as the loaded ones are."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from kontext.checkpoints import (
    empty_autoencoder,
    empty_clip,
    empty_t5,
    empty_transformer,
    load_autoencoder,
    load_clip,
    load_t5,
    load_transformer,
)
from kontext.errors import UserError

PAIRS = [
    ("dit", empty_transformer, load_transformer),
    ("dit_sharded", empty_transformer, load_transformer),
    ("vae", empty_autoencoder, load_autoencoder),
    ("t5", empty_t5, load_t5),
    ("clip", empty_clip, load_clip),
]


@pytest.mark.parametrize(("name", "empty", "load"), PAIRS, ids=[pair[0] for pair in PAIRS])
def test_the_same_tensors_but_no_numbers(tiny_files, name, empty, load):
    path = getattr(tiny_files, name)
    model = empty(path)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    loaded = load(path, device="cpu", dtype=torch.float32)
    assert {n: t.shape for n, t in model.state_dict().items()} == {
        n: t.shape for n, t in loaded.state_dict().items()
    }


@pytest.mark.parametrize("name", ["dit", "vae", "t5", "clip"])
def test_what_is_missing_is_told(tiny_files, tmp_path, name):
    empty = {pair[0]: pair[1] for pair in PAIRS}[name]
    tensors = load_file(getattr(tiny_files, name))
    lost = next(key for key in reversed(tensors) if "0" in key and "bias" not in key)
    del tensors[lost]
    save_file(tensors, tmp_path / "torn.safetensors")
    with pytest.raises(UserError, match=r"torn\.safetensors"):
        empty(tmp_path / "torn.safetensors")
