"""Files that are broken, or do not fit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kontext.errors import UserError
from kontext.lora.files import save_lora
from tests.lora.reference import (
    read,
    save,
)
from tests.lora.test_files import trained_modules


def test_nothing_matched_is_an_error_that_names_the_format(tmp_path: Path):
    path = save(tmp_path / "a.safetensors", {"lora_unet_foo_bar.lora_down.weight": torch.zeros(4, 64)})
    with pytest.raises(UserError, match=r"none of its 1 keys .*kohya/musubi format"):
        read(path)


def test_a_lora_of_another_width_names_key_and_shapes(tmp_path: Path):
    stem = "lora_unet_double_blocks_0_img_attn_proj"
    tensors = {f"{stem}.lora_down.weight": torch.zeros(4, 128), f"{stem}.lora_up.weight": torch.zeros(128, 4)}
    with pytest.raises(
        UserError, match=rf"{stem} .*128x128.*double_blocks\.0\.img_attn\.proj\.weight.*64x64"
    ):
        read(save(tmp_path / "a.safetensors", tensors))


def test_ranks_that_do_not_fit(tmp_path: Path):
    stem = "lora_unet_double_blocks_0_img_attn_proj"
    tensors = {f"{stem}.lora_down.weight": torch.zeros(4, 64), f"{stem}.lora_up.weight": torch.zeros(64, 8)}
    with pytest.raises(UserError, match=rf"{stem}: down \(4, 64\) and up \(64, 8\)"):
        read(save(tmp_path / "a.safetensors", tensors))


def test_values_that_are_not_finite(tmp_path: Path):
    modules = trained_modules()
    next(iter(modules.values())).lora_up.weight.data[0, 0] = float("nan")
    save_lora(tmp_path / "a.safetensors", modules)
    with pytest.raises(UserError, match="double_blocks_0_img_attn_qkv: up holds values that are not finite"):
        read(tmp_path / "a.safetensors")


def test_files_that_are_no_adapter(tmp_path: Path, tiny_files):
    for path in (tmp_path / "missing.safetensors", tmp_path, tiny_files.dit):
        with pytest.raises(UserError):
            read(path)
    good = tmp_path / "good.safetensors"
    save_lora(good, trained_modules())
    (tmp_path / "short.safetensors").write_bytes(good.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        read(tmp_path / "short.safetensors")


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_file({"old": torch.zeros(1)}, path)
    monkeypatch.setattr("os.replace", _full)
    with pytest.raises(UserError, match="No space left"):
        save_lora(path, trained_modules())
    assert list(load_file(path)) == ["old"] and list(tmp_path.iterdir()) == [path]


def _full(*_):
    raise OSError(28, "No space left on device")
