"""Files that are not what they should be, and reading one tensor at a time."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from kontext.checkpoints import load_transformer, open_source
from kontext.errors import UserError


def test_names_shapes_and_values(tiny_files):
    source, state = open_source(tiny_files.dit, "transformer"), load_file(tiny_files.dit)
    assert set(source.keys()) == set(state)
    for name, value in state.items():
        assert source.shape(name) == tuple(value.shape) and source.dtype(name) == value.dtype
        assert torch.equal(source.get(name), value)
    assert source.files == (tiny_files.dit,)


def test_prefixes_are_taken_away(tiny_files):
    plain, prefixed = (open_source(p, "transformer") for p in (tiny_files.dit, tiny_files.dit_prefixed))
    assert set(plain.keys()) == set(prefixed.keys())
    assert torch.equal(plain.get("img_in.weight"), prefixed.get("img_in.weight"))


def test_several_files_under_an_index(tiny_files):
    source, state = open_source(tiny_files.dit_sharded, "transformer"), load_file(tiny_files.dit_diffusers)
    assert len(source.files) > 1
    assert all(torch.equal(source.get(name), value) for name, value in state.items())
    index = tiny_files.dit_sharded / "diffusion_pytorch_model.safetensors.index.json"
    assert open_source(index, "transformer").keys() == source.keys()


def test_keys_are_in_the_order_of_the_file(tiny_files):
    header = tiny_files.dit.read_bytes()
    rows = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    rows.pop("__metadata__", None)
    expected = sorted(rows, key=lambda name: rows[name]["data_offsets"][0])
    assert open_source(tiny_files.dit, "transformer").keys() == expected


def test_metadata(tiny_files, tmp_path):
    save_file(load_file(tiny_files.vae), tmp_path / "ae.safetensors", {"title": "x"})
    assert open_source(tmp_path / "ae.safetensors", "autoencoder").metadata == {"title": "x"}


def test_one_file_with_every_model(tiny_files, tmp_path):
    parts = {
        "model.diffusion_model.": tiny_files.dit,
        "vae.": tiny_files.vae,
        "text_encoders.t5xxl.transformer.": tiny_files.t5,
        "text_encoders.clip_l.transformer.": tiny_files.clip,
    }
    state = {prefix + name: v for prefix, file in parts.items() for name, v in load_file(file).items()}
    save_file(state, tmp_path / "all.safetensors")
    for kind, file in zip(("transformer", "autoencoder", "T5", "CLIP"), parts.values(), strict=True):
        assert set(open_source(tmp_path / "all.safetensors", kind).keys()) == set(load_file(file))


# ---- bad input ----


def refused(path, kind="transformer"):
    with pytest.raises(UserError) as error:
        open_source(path, kind)
    return str(error.value)


def test_a_missing_file(tmp_path):
    assert (
        refused(tmp_path / "x.safetensors") == f"--dit: there is no file or folder {tmp_path}/x.safetensors."
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.safetensors", b"", "is empty: download it again"),
        ("x.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        ("x.safetensors", b"<!DOCTYPE html><html>Sign in</html>", "is a web page"),
        ("x.safetensors", b"GGUF\3\0\0\0 and more", "is a GGUF file"),
        ("x.safetensors", b"PK\3\4 a zip as torch.save writes it", "is a pickle, which may run any program"),
        ("x.ckpt", b"any content at all", "convert it to safetensors first"),
        ("x.safetensors", b"abc", "is not a safetensors file"),
        ("x.safetensors", b"\x10\0\0\0\0\0\0\0{'not': 'json'}  ", "its header cannot be read"),
        ("x.safetensors", b'\x0d\0\0\0\0\0\0\0{"a": [1, 2]}', "its header cannot be read"),
    ],
)
def test_what_is_no_safetensors_file(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    message = refused(tmp_path / name)
    assert words in message and name in message


@pytest.mark.parametrize("keep", [100, 100_000])
def test_a_truncated_file_names_both_sizes(tiny_files, tmp_path, keep):
    whole = tiny_files.dit.read_bytes()
    (tmp_path / "x.safetensors").write_bytes(whole[:keep])
    message = refused(tmp_path / "x.safetensors")
    assert "x.safetensors is truncated: it has" in message and f"{keep:,} bytes of " in message
    if keep > 10_000:  # the whole header is there
        assert f"of {len(whole):,}." in message


def test_folders(tiny_files, tmp_path):
    assert "holds no .safetensors file (--dit)" in refused(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"PK")
    assert "holds pickled weights only" in refused(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(tiny_files.dit.read_bytes())
    assert "several files of weights (a.safetensors, b.safetensors); give --dit one" in refused(tmp_path)


def test_a_missing_shard(tiny_files, tmp_path):
    for file in tiny_files.dit_sharded.iterdir():
        if "00002" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert "names diffusion_pytorch_model-00002-of-" in refused(tmp_path)


def test_a_broken_index(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert "is no index of safetensors files" in refused(tmp_path)


@pytest.mark.parametrize(
    ("file", "kind", "message"),
    [
        ("vae", "transformer", "is an autoencoder (BFL layout); --dit expects a FLUX transformer."),
        ("vae_diffusers", "transformer", "is an autoencoder (diffusers layout); --dit expects a FLUX transf"),
        ("dit", "autoencoder", "is a FLUX transformer (BFL layout); --vae expects a FLUX autoencoder."),
        ("dit_prefixed", "LoRA", "is a FLUX transformer (BFL layout); --lora-weight expects a LoRA."),
        ("clip", "T5", "is a CLIP text model; --text-encoder1 expects a T5 v1.1 encoder."),
        ("t5", "CLIP", "is a T5 encoder; --text-encoder2 expects a CLIP text model."),
    ],
)
def test_the_wrong_model(tiny_files, file, kind, message):
    path = getattr(tiny_files, file)
    assert refused(path, kind).startswith(f"{path} {message}")


# ---- memory ----

MEASURE = """
import resource, sys
from threading import Event, Thread
import torch
from kontext.checkpoints import load_transformer

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

def watch(done, peak):
    while not done.wait(0.001):
        peak.append(anonymous())

torch.zeros(8, 8) @ torch.zeros(8, 8)
start, done, peak = anonymous(), Event(), []
thread = Thread(target=watch, args=(done, peak))
thread.start()
mode = sys.argv[2] if sys.argv[2] != "None" else None
model = load_transformer(sys.argv[1], device="cpu", dtype=torch.float32, quantization=mode)
done.set(); thread.join()
kept = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]) / 2**20
print(max(peak) - start, kept)
"""


@pytest.fixture(scope="module")
def large_file(tmp_path_factory):
    """A transformer of 160 MB in bfloat16 whose largest tensor has 4 MB (7 MB in float32)."""
    from tests import bfl_names, tiny

    state = tiny.make_transformer(seed=0, width=512, blocks=6).state_dict()
    state = {name: value.bfloat16() for name, value in bfl_names.bfl_transformer(state, 6, 6).items()}
    path = tmp_path_factory.mktemp("large") / "dit.safetensors"
    save_file(state, path)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("mode", [None, "fp8_scaled"])
def test_loading_needs_little_more_than_the_model(large_file, mode):
    """Host memory beyond the finished model stays below a few of its largest tensors, not a second model."""
    command = [sys.executable, "-c", MEASURE, str(large_file), str(mode)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    peak, kept = map(float, out.split())
    size = large_file.stat().st_size / 2**20
    assert size > 150
    assert peak < kept + 60, f"peak {peak:.0f} MB for a model of {kept:.0f} MB"


def test_on_the_cpu_tensors_share_the_file(tiny_files):
    """Nothing is copied until a tensor is cast: the system reads pages as they are used."""
    source = open_source(tiny_files.vae, "autoencoder")
    key = "encoder.conv_in.weight"
    assert source.get(key).data_ptr() == source.get(key).data_ptr()


def test_files_close_with_the_models(tiny_files):
    """Loading many files in one process leaves no descriptors open."""
    import os

    folder = "/proc/self/fd"
    if not os.path.isdir(folder):
        pytest.skip("open files are listed in /proc on Linux only")
    before = len(os.listdir(folder))
    for _ in range(5):
        load_transformer(tiny_files.dit, device="cpu", dtype=torch.bfloat16)
    assert len(os.listdir(folder)) <= before + 1
