import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kontext.checkpoints import load_transformer, open_source
from kontext.errors import UserError
from kontext.lora.files import save_lora
from kontext.lora.merge import plan_merge
from kontext.lora.rewrite import Layout, Loss, SaveType, plan_checkpoint, write_checkpoint
from tests.bfl_names import bfl_transformer
from tests.lora.models import CONFIG, relative_error
from tests.lora.reference import read
from tests.lora.test_merge import adapted, velocity


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory, tiny_files) -> Path:
    path = tmp_path_factory.mktemp("lora") / "a.safetensors"
    save_lora(path, adapted(tiny_files.dit)[1])
    return path


def merge(
    base: Path,
    lora: Path,
    out: Path,
    *,
    dtype: SaveType | None = None,
    layout: Layout | None = None,
    metadata: dict[str, str] | None = None,
) -> Loss:
    source = open_source(base, "transformer")
    plan = plan_merge([read(lora)], [1.0])
    checkpoint = plan_checkpoint(source, plan, dtype=dtype, layout=layout)
    return write_checkpoint(checkpoint, out, metadata=metadata or {})


def expected(tiny_files, lora: Path) -> dict[str, Tensor]:
    """Merged weights under BFL's names, by the formula."""
    weights, tensors = load_file(tiny_files.dit), load_file(lora)
    for name in weights:
        stem = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        if f"{stem}.lora_up.weight" in tensors:
            up, down = tensors[f"{stem}.lora_up.weight"], tensors[f"{stem}.lora_down.weight"]
            weights[name] = weights[name] + tensors[f"{stem}.alpha"] / len(down) * up @ down
    return weights


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert relative_error(found[name].float(), value) <= tolerance, name


def test_bfl_file(tmp_path: Path, tiny_files, lora: Path):
    out = tmp_path / "m.safetensors"
    merge(tiny_files.dit, lora, out, metadata={"merged_from": "x"})
    assert_close(load_file(out), expected(tiny_files, lora))
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"merged_from": "x"}
    assert list(tmp_path.iterdir()) == [out]


def test_strips_of_any_height_give_the_same(tmp_path: Path, tiny_files, lora: Path, monkeypatch):
    merge(tiny_files.dit_sharded, lora, tmp_path / "m.safetensors", layout="bfl")
    monkeypatch.setattr("kontext.lora.rewrite.VALUES", 1000)
    merge(tiny_files.dit_sharded, lora, tmp_path / "n.safetensors", layout="bfl")
    assert_close(load_file(tmp_path / "n.safetensors"), load_file(tmp_path / "m.safetensors"))


def test_untouched_tensors_are_equal_to_the_bit(tmp_path: Path, tiny_files, lora: Path):
    merge(tiny_files.dit, lora, tmp_path / "m.safetensors")
    before, after = load_file(tiny_files.dit), load_file(tmp_path / "m.safetensors")
    untouched = [k for k in before if k.endswith(("bias", "scale", "lin.weight")) or "_in" in k]
    assert len(untouched) > 30
    assert all(torch.equal(before[k], after[k]) for k in untouched)


def test_the_prefix_stays(tmp_path: Path, tiny_files, lora: Path):
    merge(tiny_files.dit_prefixed, lora, tmp_path / "m.safetensors")
    wanted = {f"model.diffusion_model.{k}": v for k, v in expected(tiny_files, lora).items()}
    assert_close(load_file(tmp_path / "m.safetensors"), wanted)


def test_the_merged_model_equals_the_adapted_one(tmp_path: Path, tiny_files, lora: Path):
    model, _ = adapted(tiny_files.dit)
    for base in (tiny_files.dit, tiny_files.dit_prefixed, tiny_files.dit_diffusers, tiny_files.dit_sharded):
        merge(base, lora, tmp_path / "m.safetensors")
        merged = load_transformer(tmp_path / "m.safetensors", device="cpu", dtype=torch.float32)
        assert relative_error(velocity(merged), velocity(model)) < 1e-5


def diffusers_as_bfl(folder: Path) -> dict[str, Tensor]:
    model = FluxTransformer2DModel.from_pretrained(folder)
    return bfl_transformer(dict(model.state_dict()), CONFIG.double_blocks, CONFIG.single_blocks)


@pytest.mark.parametrize("base", ["dit_sharded", "pipeline", "dit_diffusers"])
def test_diffusers_layout_stays(tmp_path: Path, tiny_files, lora: Path, base: str):
    merge(getattr(tiny_files, base), lora, tmp_path / "m.safetensors")
    found = load_file(tmp_path / "m.safetensors")
    assert found.keys() == load_file(tiny_files.dit_diffusers).keys()
    assert_close(
        bfl_transformer(found, CONFIG.double_blocks, CONFIG.single_blocks), expected(tiny_files, lora)
    )


def test_a_folder_that_diffusers_loads(tmp_path: Path, tiny_files, lora: Path):
    merge(tiny_files.dit_sharded, lora, tmp_path / "merged")
    assert_close(diffusers_as_bfl(tmp_path / "merged"), expected(tiny_files, lora))


def test_layouts_are_converted_both_ways(tmp_path: Path, tiny_files, lora: Path):
    merge(tiny_files.dit_prefixed, lora, tmp_path / "d.safetensors", layout="diffusers")
    found = bfl_transformer(load_file(tmp_path / "d.safetensors"), CONFIG.double_blocks, CONFIG.single_blocks)
    assert_close(found, expected(tiny_files, lora))
    merge(tiny_files.dit_sharded, lora, tmp_path / "b.safetensors", layout="bfl")
    assert_close(load_file(tmp_path / "b.safetensors"), expected(tiny_files, lora))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_is_rounded_once(tmp_path: Path, tiny_files, lora: Path, dtype: torch.dtype):
    merge(tiny_files.dit, lora, tmp_path / "m.safetensors", dtype=dtype)
    found = load_file(tmp_path / "m.safetensors")
    assert {t.dtype for t in found.values()} == {dtype}
    merge(tiny_files.dit, lora, tmp_path / "full.safetensors")
    full = load_file(tmp_path / "full.safetensors")
    assert all(torch.equal(found[k], full[k].to(dtype)) for k in full)


def test_a_bfloat16_base_keeps_its_dtype(tmp_path: Path, tiny_files, lora: Path):
    half = {k: v.to(torch.bfloat16) for k, v in load_file(tiny_files.dit).items()}
    save_file(half, tmp_path / "base.safetensors", metadata={"format": "pt"})
    merge(tmp_path / "base.safetensors", lora, tmp_path / "m.safetensors")
    found = load_file(tmp_path / "m.safetensors")
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    assert_close(found, expected(tiny_files, lora), tolerance=4e-3)


def scaled_fp8(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """ComfyUI's layout: the blocks' linears in e4m3, one factor each, and the marker."""
    out = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, weight in weights.items():
        if weight.ndim == 2 and "blocks" in name and not name.endswith("lin.weight"):
            scale = weight.abs().max() / 448
            out[name] = (weight / scale).to(torch.float8_e4m3fn)
            out[name.replace(".weight", ".scale_weight")] = scale
        else:
            out[name] = weight
    return out


def plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What scaled fp8 tensors stand for."""
    one = torch.tensor(1.0)
    names = [n for n in tensors if not n.endswith(("scale_weight", "scaled_fp8"))]
    return {
        n: tensors[n].float() * tensors.get(f"{n.removesuffix('.weight')}.scale_weight", one) for n in names
    }


def test_a_scaled_fp8_base_is_scaled_anew(tmp_path: Path, tiny_files, lora: Path):
    base = scaled_fp8(load_file(tiny_files.dit))
    save_file(base, tmp_path / "base.safetensors")
    loss = merge(tmp_path / "base.safetensors", lora, tmp_path / "m.safetensors")
    found = load_file(tmp_path / "m.safetensors")
    assert {k: (v.dtype, v.shape) for k, v in found.items()} == {
        k: (v.dtype, v.shape) for k, v in base.items()
    }
    assert_close(plain(found), expected(tiny_files, lora), tolerance=0.06)
    assert 0.005 < loss.relative < 0.5
    merged = load_transformer(tmp_path / "m.safetensors", device="cpu", dtype=torch.float32)
    assert relative_error(velocity(merged), velocity(adapted(tiny_files.dit)[0])) < 0.1


def test_a_plain_fp8_base(tmp_path: Path, tiny_files, lora: Path):
    base = {k: v.to(torch.float8_e4m3fn) for k, v in load_file(tiny_files.dit).items()}
    save_file(base, tmp_path / "base.safetensors")
    merge(tmp_path / "base.safetensors", lora, tmp_path / "m.safetensors")
    found = load_file(tmp_path / "m.safetensors")
    assert {t.dtype for t in found.values()} == {torch.float8_e4m3fn}
    assert_close({k: v.float() for k, v in found.items()}, expected(tiny_files, lora), tolerance=0.06)


def test_fp8_can_be_left_and_made(tmp_path: Path, tiny_files, lora: Path):
    save_file(scaled_fp8(load_file(tiny_files.dit)), tmp_path / "base.safetensors")
    merge(tmp_path / "base.safetensors", lora, tmp_path / "half.safetensors", dtype=torch.bfloat16)
    half = load_file(tmp_path / "half.safetensors")
    assert half.keys() == load_file(tiny_files.dit).keys()
    assert_close(half, expected(tiny_files, lora), tolerance=0.06)

    merge(tiny_files.dit, lora, tmp_path / "m.safetensors", dtype="fp8_scaled")
    made = load_file(tmp_path / "m.safetensors")
    model = scaled_fp8(expected(tiny_files, lora))
    assert made.keys() == model.keys()
    assert_close(plain(made), plain(model), tolerance=1e-2)
    merged = load_transformer(tmp_path / "m.safetensors", device="cpu", dtype=torch.float32)
    assert relative_error(velocity(merged), velocity(adapted(tiny_files.dit)[0])) < 0.1


def test_combinations_that_nobody_reads_are_refused(tmp_path: Path, tiny_files, lora: Path):
    with pytest.raises(UserError, match="not published in diffusers' layout"):
        merge(tiny_files.dit_diffusers, lora, tmp_path / "m.safetensors", dtype="fp8_scaled")
    save_file(scaled_fp8(load_file(tiny_files.dit)), tmp_path / "base.safetensors")
    with pytest.raises(UserError, match="Give --save-dtype"):
        merge(tmp_path / "base.safetensors", lora, tmp_path / "m.safetensors", layout="diffusers")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, tiny_files, lora: Path, monkeypatch):
    out = tmp_path / "m.safetensors"
    out.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
        with pytest.raises(UserError, match=r"needs 0\.0 GB"):
            merge(tiny_files.dit, lora, out)
    with monkeypatch.context() as patch:
        patch.setattr("kontext.lora.stream.Writer.put", _full)
        with pytest.raises(UserError, match="No space left"):
            merge(tiny_files.dit, lora, out)
    assert out.read_bytes() == b"old" and list(tmp_path.iterdir()) == [out]


def _full(*_):
    raise OSError(28, "No space left on device")


def test_a_file_may_replace_its_own_base(tmp_path: Path, tiny_files, lora: Path):
    shutil.copy(tiny_files.dit, tmp_path / "m.safetensors")
    merge(tmp_path / "m.safetensors", lora, tmp_path / "m.safetensors")
    assert_close(load_file(tmp_path / "m.safetensors"), expected(tiny_files, lora))


PEAK = """
import resource, sys
from pathlib import Path
from kontext.checkpoints import open_source
from kontext.lora.rewrite import plan_checkpoint, write_checkpoint
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
checkpoint = plan_checkpoint(open_source(sys.argv[1], "transformer"), {})
write_checkpoint(checkpoint, Path(sys.argv[2]), metadata={})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_file(tmp_path: Path, tiny_files):
    """300 MB more of tensors beside the model cost no 300 MB of memory."""
    tensors = load_file(tiny_files.dit)
    tensors |= {f"double_blocks.0.extra.{i}.weight": torch.zeros(6, 5_000_000) for i in range(3)}
    save_file(tensors, tmp_path / "big.safetensors")
    command = [sys.executable, "-c", PEAK, tmp_path / "big.safetensors", tmp_path / "m.safetensors"]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown < 100_000, f"{grown} KiB"
    assert (tmp_path / "m.safetensors").stat().st_size > 360e6
