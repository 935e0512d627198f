"""`kontext generate` with LoRA files: merged, attached, at changing strengths, saved."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kontext.cli import main


@pytest.fixture
def lora(tiny_files, tmp_path):
    """A LoRA of rank 2 in kohya's names, and the transformer with it merged by hand, in float32."""
    base = load_file(tiny_files.dit)
    adapter, generator = {}, torch.Generator().manual_seed(0)
    for name in ("double_blocks.0.img_attn.qkv", "single_blocks.1.linear1"):
        rows, columns = base[f"{name}.weight"].shape
        stem = "lora_unet_" + name.replace(".", "_")
        adapter[f"{stem}.lora_down.weight"] = torch.randn(2, columns, generator=generator) / 8
        adapter[f"{stem}.lora_up.weight"] = torch.randn(rows, 2, generator=generator) / 4
        adapter[f"{stem}.alpha"] = torch.tensor(1.0)
        product = adapter[f"{stem}.lora_up.weight"] @ adapter[f"{stem}.lora_down.weight"]
        base[f"{name}.weight"] += 0.5 * product  # alpha / rank
    save_file(adapter, tmp_path / "lora.safetensors")
    save_file(base, tmp_path / "merged.safetensors")
    return tmp_path / "lora.safetensors", tmp_path / "merged.safetensors"


def latent(generate, folder, name, *more, **changes):
    options = ("--prompt", "red", "--seed", 1, "--output-type", "latent", "--output-name", name)
    code, said = generate(*options, *more, **changes)
    assert code == 0, said
    return load_file(folder / "out" / f"{name}.safetensors")["latent"]


def test_a_lora_acts_like_the_merged_model(generate, tmp_path, lora):
    file, merged = lora
    plain = latent(generate, tmp_path, "plain")
    expected = latent(generate, tmp_path, "merged", dit=merged)
    found = latent(generate, tmp_path, "lora", "--lora-weight", file)
    assert (found - expected).abs().max() < 1e-5 < 1e-2 < (plain - expected).abs().max()
    twice = latent(generate, tmp_path, "twice", "--lora-weight", file, file, "--lora-multiplier", 0.25, 0.75)
    assert (twice - expected).abs().max() < 1e-5


def test_strengths_in_prompt_lines(generate, tmp_path, lora):
    plain = latent(generate, tmp_path, "plain")
    full = latent(generate, tmp_path, "full", "--lora-weight", lora[0])
    (tmp_path / "p.txt").write_text("red --m 0\nred --m 1\nred\nred --m 1 2\n")
    options = ("--seed", 1, "--output-type", "latent", "--output-name", "x", "--lora-weight", lora[0])
    code, said = generate("--from-file", tmp_path / "p.txt", *options)
    assert code == 2 and "2 LoRA strengths are given, but there are 1 LoRA files" in said
    found, strengths = [], []
    for number in (1, 2, 3):
        with safe_open(tmp_path / "out" / f"x_00{number}.safetensors", "pt") as file:
            found.append(file.get_tensor("latent"))
            strengths.append(file.metadata()["lora_multiplier"])
    assert strengths == ["0", "1", "1"]
    for one, expected in zip(found, (plain, full, full), strict=True):
        assert (one - expected).abs().max() < 1e-5


def test_blocks_of_their_own_strength(generate, tmp_path, lora):
    """The LoRA has a double and a single block: without either, what is left is the other one's."""
    attached = latent(generate, tmp_path, "a", "--lora-weight", lora[0], "--lora-multiplier", "1:single=0")
    (tmp_path / "p.txt").write_text(
        "red --m 1:single=0\nred --m 1:single0=0,double=1,single1=0\nred --m 1:double=0\n"
    )
    options = ("--seed", 1, "--output-type", "latent", "--output-name", "x", "--lora-weight", lora[0])
    code, said = generate("--from-file", tmp_path / "p.txt", *options)
    found = [load_file(tmp_path / "out" / f"x_00{number}.safetensors")["latent"] for number in (1, 2, 3)]
    assert code == 0 and (found[0] - attached).abs().max() < 1e-5 and (found[1] - attached).abs().max() < 1e-5
    assert (found[2] - attached).abs().max() > 1e-2
    code, said = generate("--prompt", "x", "--lora-weight", lora[0], "--lora-multiplier", "1:treble=2")
    assert code == 2 and "'1:treble=2' is no strength. Write a number" in said


@pytest.mark.parametrize("flag", ["--fp8", "--fp8-scaled", "--int8", "--nf4"])
def test_a_lora_survives_quantisation(generate, tmp_path, lora, flag):
    """The LoRA's effect on the quantised model is its effect on the whole one, not lost to rounding."""
    small = ("--lora-weight", lora[0], "--lora-multiplier", 0.02)
    effect = latent(generate, tmp_path, "a", *small) - latent(generate, tmp_path, "b")
    quantised = latent(generate, tmp_path, "c", *small, flag) - latent(generate, tmp_path, "d", flag)
    assert (quantised - effect).norm() < 0.3 * effect.norm()


def test_save_merged_model_is_merge_and_makes_no_picture(generate, tmp_path, lora):
    file, merged = lora
    code, _ = generate(
        "--lora-weight", file, "--save-merged-model", tmp_path / "out.safetensors", "--prompt", "x"
    )
    assert code == 0 and not (tmp_path / "out").exists()
    found, expected = load_file(tmp_path / "out.safetensors"), load_file(merged)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)
    code = main(
        f"merge --dit {generate.models['--dit']} --lora-weight {file} --output {tmp_path / 'cmd.safetensors'}".split()
    )
    assert code == 0
    assert (tmp_path / "cmd.safetensors").read_bytes() == (tmp_path / "out.safetensors").read_bytes()


def test_save_merged_model_without_a_lora(generate, tmp_path):
    code, said = generate("--save-merged-model", tmp_path / "out.safetensors")
    assert code == 2 and "--lora-weight" in said
