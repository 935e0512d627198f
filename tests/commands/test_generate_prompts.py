"""`kontext generate`: prompt files of all kinds, commands of the interactive mode, and prompts that are too long."""

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from kontext.generation import parts


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_jsonl_file(generate, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "red", "seed": 1, "infer_steps": 1, "width": 80}\n')
    code, _ = generate("--from-file", tmp_path / "p.jsonl", "--output-name", "x")
    with Image.open(tmp_path / "out" / "x.png") as picture:
        assert code == 0 and picture.size == (80, 64) and picture.text["seeds"] == "1"


def test_commands_while_typing(generate, tmp_path, monkeypatch):
    lines = iter(
        [
            "/help",
            "/set seed 9",
            "/set",
            "/set magic 3",
            "/set s none",
            "/off",
            "red --s 1",
            "red --d 4 --s 1",
        ]
    )

    def typed(*_):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    code, said = generate("--interactive")
    assert (
        code == 0 and "embedded_cfg_scale (--g): a guidance scale" in said and "seed is 9 from now on" in said
    )
    for mistake in (
        "/set: unknown; commands are",
        "unknown setting magic",
        "/set s needs a number of steps",
        "/off: unk",
    ):
        assert mistake in said
    names = [name.rpartition("_")[2] for name in files(tmp_path / "out")]
    assert sorted(names) == ["4.png", "9.png"]


def test_what_is_cut_from_a_prompt_is_said(generate):
    options = ("--seed", 1, "--infer-steps", 1)
    code, said = generate("--prompt", "red " * 15, *options)
    assert code == 0 and "leaves out" not in said
    code, said = generate("--prompt", "red " * 15 + "blue circle", *options)
    assert (
        code == 0
        and 'T5 reads 16 tokens and leaves out "blue circle"; --t5-max-length 512 reads more.' in said
    )


def test_attached_loras_act_as_merged_ones(generate, tmp_path, monkeypatch):
    stem = "lora_unet_double_blocks_0_img_attn_proj"
    down, up = torch.full((1, 64), 0.125), torch.ones(64, 1)
    save_file({f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}, tmp_path / "a.safetensors")
    attach, calls = parts.attach_adapters, []

    def counted(*given, **more):
        calls.append(given)
        return attach(*given, **more)

    monkeypatch.setattr(parts, "attach_adapters", counted)
    latents = {}
    for name, more in {"merged": (), "attached": ("--lora-attach",)}.items():
        options = ("--prompt", "x", "--seed", 1, "--output-type", "latent", "--output-name", name, *more)
        assert generate(*options, "--lora-weight", tmp_path / "a.safetensors")[0] == 0
        assert len(calls) == (name == "attached")
        latents[name] = load_file(tmp_path / "out" / f"{name}.safetensors")["latent"]
    assert (latents["merged"] - latents["attached"]).abs().max() < 1e-5
