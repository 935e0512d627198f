"""`kontext generate` with files that are broken, or not what they should be: one sentence, before models load."""

import struct
import zlib

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

STEM = "lora_unet_double_blocks_0_img_attn_proj"


def pair(stem, *, rank=2, width=64, height=64):
    return {
        f"{stem}.lora_down.weight": torch.zeros(rank, width),
        f"{stem}.lora_up.weight": torch.zeros(height, 2),
    }


LORAS = {
    "another model": (
        pair("lora_unet_blocks_0_self_attn_q"),
        "is an adapter for Wan, not for FLUX.1 Kontext",
    ),
    "another size": (pair(STEM, width=3072, height=3072), "It was made for a model of another size"),
    "ranks": (pair(STEM, rank=3), f"{STEM}: down (3, 64) and up (64, 2)"),
    "unknown names": ({"a.lora_down.weight": torch.zeros(2, 64)}, "none of its 1 keys"),
    "nothing": ({"x": torch.zeros(1)}, "is nothing that kontext knows"),
}


@pytest.mark.parametrize("tensors, message", LORAS.values(), ids=LORAS)
def test_loras(generate, tmp_path, tensors, message):
    save_file(tensors, tmp_path / "bad.safetensors")
    code, said = generate("--prompt", "x", "--lora-weight", tmp_path / "bad.safetensors")
    assert code == 2 and "bad.safetensors" in said and message in said
    assert "Loading" not in said and "Traceback" not in said


@pytest.mark.parametrize("size", [5, 60, 400])
def test_a_truncated_lora(generate, tmp_path, size):
    path = tmp_path / "bad.safetensors"
    save_file(pair(STEM), path)
    path.write_bytes(path.read_bytes()[:size])
    code, said = generate("--prompt", "x", "--lora-weight", path)
    assert code == 2 and "bad.safetensors" in said and "Loading" not in said and "Traceback" not in said


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(path, width, height, *more):
    """A PNG that claims a size and holds almost nothing, with more chunks."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), *more, chunk(b"IDAT", zlib.compress(b"\0" * 100)), chunk(b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


BOMB = chunk(b"zTXt", b"prompt\0\0" + zlib.compress(b"a" * (1 << 27)))


@pytest.mark.parametrize(
    "size, more, message",
    [
        ((1, 1), (), "1x1 pixels are too few"),
        ((20_000, 20_000), (), "more than 178 megapixels"),
        ((64, 64), (BOMB,), "reference.png"),
        ((64, 64), (), "reference.png"),
    ],
)
def test_references(generate, tmp_path, size, more, message):
    path = tmp_path / "reference.png"
    if size == (1, 1):
        Image.new("RGB", size).save(path)
    else:
        png(path, *size, *more)
    code, said = generate("--prompt", "x", "--control-image", path)
    assert code == 2 and message in said and "Loading the transformer" not in said and "Traceback" not in said


def test_settings_that_unpack_to_a_gigabyte(generate, tmp_path):
    png(tmp_path / "bomb.png", 64, 64, BOMB)
    code, said = generate("--from-image", tmp_path / "bomb.png", size=None)
    assert code == 2 and "bomb.png: its settings cannot be read" in said and "Traceback" not in said


@pytest.mark.parametrize("size, made", [((48, 32), (32, 48)), ((63, 50), (48, 48)), ((16, 16), (16, 16))])
def test_small_and_odd_sizes_are_rounded_down_and_said(generate, tmp_path, size, made):
    """Sizes are height, width; made is width, height."""
    code, said = generate("--prompt", "x", "--output-name", "x", "--infer-steps", 1, size=size)
    with Image.open(tmp_path / "out" / "x.png") as picture:
        assert code == 0 and picture.size == made
    assert ("is rounded down to" in said) == (made != size[::-1])
