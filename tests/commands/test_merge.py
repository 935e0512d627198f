from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kontext.cli import main
from kontext.lora.files import save_lora
from tests.lora.models import relative_error
from tests.lora.test_merge import adapted


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory, tiny_files) -> Path:
    path = tmp_path_factory.mktemp("lora") / "a.safetensors"
    save_lora(path, adapted(tiny_files.dit)[1])
    return path


def merge(*arguments: object) -> int:
    return main(["merge", *map(str, arguments)])


def change(base: Path, merged: Path) -> dict[str, torch.Tensor]:
    before, after = load_file(base), load_file(merged)
    return {k: after[k] - v for k, v in before.items() if not torch.equal(after[k], v)}


def test_several_loras_at_their_strengths(tmp_path: Path, tiny_files, lora: Path, capsys):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    assert merge("--dit", tiny_files.dit, "--lora-weight", lora, "--save-merged-model", one) == 0
    code = merge(
        "--dit", tiny_files.dit, "--lora-weight", lora, lora, "--lora-multiplier", 1.0, 0.5, "--output", two
    )
    assert code == 0
    single, double = change(tiny_files.dit, one), change(tiny_files.dit, two)
    assert single.keys() == double.keys() and len(single) == 20
    for name, value in single.items():
        assert relative_error(double[name], 1.5 * value) < 1e-5
    shown = capsys.readouterr().err
    assert "LoRA (kohya/musubi), 20 modules" in shown and "20 of 84 tensors changed" in shown
    with safe_open(two, "pt") as file:
        base = "flux1-kontext-dev.safetensors"
        assert file.metadata()["merged_from"] == f"{base} + 1 * a.safetensors + 0.5 * a.safetensors"


def test_one_multiplier_serves_all(tmp_path: Path, tiny_files, lora: Path):
    out = tmp_path / "m.safetensors"
    arguments = ["--dit", tiny_files.dit, "--lora_weight", lora, lora, "--lora_multiplier", 0.5]
    assert merge(*arguments, "--save_merged_model", out) == 0
    once = tmp_path / "once.safetensors"
    assert merge("--dit", tiny_files.dit, "--lora-weight", lora, "--output", once) == 0
    for name, value in change(tiny_files.dit, once).items():
        assert relative_error(change(tiny_files.dit, out)[name], value) < 1e-5


def test_patterns_precision_and_layout(tmp_path: Path, tiny_files, lora: Path):
    out = tmp_path / "folder"
    code = merge(
        "--dit", tiny_files.dit, "--lora-weight", lora, "--output", out, "--save-dtype", "fp32",
        "--layout", "diffusers", "--include-patterns", r"double_blocks\.0\..*",
        "--exclude-patterns", r".*mlp.*",
    )  # fmt: skip
    assert code == 0
    changed = change(tiny_files.dit_diffusers, out / "diffusion_pytorch_model.safetensors")
    names = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")
    assert sorted(changed) == sorted(f"transformer_blocks.0.attn.{name}.weight" for name in names)


def test_unmatched_keys_are_shown(tmp_path: Path, tiny_files, lora: Path, capsys):
    strange = tmp_path / "strange.safetensors"
    save_file(load_file(lora) | {"lora_unet_odd.lora_up.weight": torch.zeros(1)}, strange)
    assert (
        merge("--dit", tiny_files.dit, "--lora-weight", strange, "--output", tmp_path / "m.safetensors") == 0
    )
    assert "1 keys fit no module, not applied: lora_unet_odd.lora_up.weight" in capsys.readouterr().err


def test_an_fp8_base_says_what_is_lost(tmp_path: Path, tiny_files, lora: Path, capsys):
    base = tmp_path / "fp8.safetensors"
    save_file({k: v.to(torch.float8_e4m3fn) for k, v in load_file(tiny_files.dit).items()}, base)
    assert merge("--dit", base, "--lora-weight", lora, "--output", tmp_path / "m.safetensors") == 0
    assert "Rounding to 8 bits moved the merged weights by" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora-weight", "{lora}", "--layout", "bfl", "--output", "{out}"], "--layout is for checkpoints"),
        (["--lora-weight", "{lora}", "--save-dtype", "fp8_scaled", "--output", "{out}"],
         "is for checkpoints"),
        (["--extract", "{dit}", "--output", "{out}"], "--extract needs --dit"),
        (["--extract", "{dit}", "--dit", "{dit}", "--rank", "4", "--output", "{out}"], "do not differ"),
        (["--lora-weight", "{lora}", "--ema-beta", "0.9", "--ema-sigma-rel", "0.1", "--output", "{out}"],
         "not both"),
        (["--dit", "{dit}", "--output", "{out}"], "give at least one --lora-weight"),
        (["--dit", "{dit}", "--lora-weight", "{lora}"], "--save-merged-model"),
        (["--dit", "{dit}", "--lora-weight", "{lora}", "--lora-multiplier", "1", "2", "--output", "{out}"],
         "2 multipliers were given for 1 LoRAs"),
        (["--dit", "{dit}", "--lora-weight", "{dit}", "--output", "{out}"], "--lora-weight expects a LoRA"),
        (["--dit", "{lora}", "--lora-weight", "{lora}", "--output", "{out}"], "is a LoRA; --dit expects"),
        (["--dit", "{dit}", "--lora-weight", "gone.safetensors", "--output", "{out}"], "gone.safetensors"),
        (["--dit", "{dit}", "--lora-weight", "{lora}", "--output", "{folder}"], "it is a folder"),
    ],
)  # fmt: skip
def test_mistakes(tmp_path: Path, tiny_files, lora: Path, capsys, arguments: list[str], message: str):
    places = {"lora": lora, "dit": tiny_files.dit, "out": tmp_path / "m.safetensors", "folder": tmp_path}
    assert merge(*(a.format(**places) for a in arguments)) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def merged(base: Path, lora: Path, out: Path) -> dict[str, torch.Tensor]:
    assert merge("--dit", base, "--lora-weight", lora, "--output", out) == 0
    return change(base, out)


@pytest.mark.parametrize("format", ["kohya", "diffusers", "bfl", "comfy"])
def test_several_loras_become_one(tmp_path: Path, tiny_files, lora: Path, format: str):
    one, whole = tmp_path / "one.safetensors", merged(tiny_files.dit, lora, tmp_path / "m.safetensors")
    arguments = ["--lora-weight", lora, lora, "--lora-multiplier", 1.0, 0.5, "--format", format]
    assert merge(*arguments, "--output", one) == 0
    found = merged(tiny_files.dit, one, tmp_path / "n.safetensors")
    assert found.keys() == whole.keys()
    assert all(relative_error(found[name], 1.5 * value) < 1e-5 for name, value in whole.items())
    with safe_open(one, "pt") as file:
        assert file.metadata()["merged_from"] == "1 * a.safetensors + 0.5 * a.safetensors"


def test_converting_there_and_back_changes_no_bit(tmp_path: Path, lora: Path):
    comfy, back = tmp_path / "comfy.safetensors", tmp_path / "back.safetensors"
    assert merge("--lora-weight", lora, "--format", "comfy", "--output", comfy) == 0
    assert merge("--lora-weight", comfy, "--output", back) == 0
    before, after = load_file(lora), load_file(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], v) for k, v in after.items())


def test_a_smaller_rank_says_what_it_keeps(tmp_path: Path, tiny_files, lora: Path, capsys):
    small = tmp_path / "small.safetensors"
    assert merge("--lora-weight", lora, "--rank", 2, "--output", small) == 0
    shown = capsys.readouterr().err
    assert "double_blocks.0.img_attn.qkv" in shown and "20 modules, kohya format, rank 2" in shown
    assert load_file(small)["lora_unet_single_blocks_0_linear2.lora_down.weight"].shape[0] == 2
    with safe_open(small, "pt") as file:
        assert file.metadata()["ss_network_dim"] == file.metadata()["ss_network_alpha"] == "2"
    whole = merged(tiny_files.dit, lora, tmp_path / "m.safetensors")
    part = merged(tiny_files.dit, small, tmp_path / "n.safetensors")
    assert all(0.1 < relative_error(part[name], value) < 0.9 for name, value in whole.items())


def test_a_lora_comes_back_out_of_its_merged_model(tmp_path: Path, tiny_files, lora: Path):
    whole = merged(tiny_files.dit, lora, tmp_path / "m.safetensors")
    out = tmp_path / "extracted.safetensors"
    arguments = ["--dit", tiny_files.dit, "--extract", tmp_path / "m.safetensors", "--rank", 4]
    assert merge(*arguments, "--output", out) == 0
    found = merged(tiny_files.dit, out, tmp_path / "n.safetensors")
    assert all(relative_error(found[name], value) < 1e-4 for name, value in whole.items())


def test_checkpoints_of_a_run_are_averaged(tmp_path: Path, lora: Path):
    paths = []
    for step, factor in ((200, 3.0), (100, 1.0)):
        paths.append(tmp_path / f"{step}.safetensors")
        save_file(
            {k: v * factor for k, v in load_file(lora).items()}, paths[-1], metadata={"ss_steps": str(step)}
        )
    out = tmp_path / "mean.safetensors"
    assert merge("--lora-weight", *paths, "--ema-beta", 0.75, "--output", out) == 0
    mean = load_file(out)
    assert all(relative_error(mean[k], v * 1.5) < 1e-6 for k, v in load_file(lora).items() if v.any())
    with safe_open(out, "pt") as file:
        assert file.metadata()["ss_steps"] == "200"
