"""`kontext train --dry-run`: what it shows, what it refuses, and that it leaves nothing behind."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kontext.cli import main
from tests.training.command import metadata, train
from tests.training.dataset import Cached

SETTINGS = "--max-train-epochs 4 --save-every-n-epochs 1 --save-state --ema-decay 0.9"


def shown(text: str) -> dict[str, list[str]]:
    """Rows of all tables, by the first cell."""
    lines = [line.replace("┃", "│").strip("│ ").split("│") for line in text.splitlines()]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in lines if len(row) > 1}


def size(words: str) -> float:
    """`1.5 MiB` in bytes."""
    number, unit = words.split()
    return float(number) * {"MiB": 2**20, "GiB": 2**30}[unit]


def dry(cached: Cached, folder: Path, settings: str = "") -> int:
    return train(cached, folder, f"--dry-run {settings}")


def test_what_the_run_will_take(cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against the run itself: its files have the sizes that were told."""
    assert dry(cached, tmp_path, SETTINGS) == 0
    table = shown(capsys.readouterr().out)
    assert not list(tmp_path.iterdir())
    assert next(row for name, row in table.items() if name.endswith("after")) == ["5", "5", "0", "1"]
    assert table["80x64"] == ["80x64", "3", "2"] and table["64x64"] == ["64x64", "2", "1"]
    assert table["steps"] == ["12"] and table["epochs"] == ["4"]
    assert table["batches an epoch"] == ["3 of 5 items"]
    assert table["largest batch"] == ["2 x 56 tokens"]  # 16 of text, 20 of the target, 20 of the reference
    files, most = table["files"][0].split("; at most ")
    assert files == "4 adapters, 4 states"
    assert train(cached, tmp_path, SETTINGS) == 0
    written = list(tmp_path.rglob("*.safetensors"))
    assert len(written) == 2 * 4 + 4
    total = sum(path.stat().st_size for path in written)
    assert total < size(most.removesuffix(" at a time")) < 1.2 * total


def test_blocks_of_the_same_pictures_are_told_apart(
    cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One with references and one without, in one bucket each, which is told once."""
    plain, edits = tmp_path / "plain", tmp_path / "edits"
    images = cached.config.parent / "after"
    config = tmp_path / "dataset.toml"
    block = f"[[datasets]]\nimage_directory = '{images}'\ncache_directory = "
    config.write_text(
        f"[general]\nresolution = 64\n{block}'{plain}'\n"
        f"{block}'{edits}'\ncontrol_directory = '{cached.reference.parent}'\n"
    )
    common = ["--dataset-config", str(config), *cached.models[2:6]]
    assert main(["cache-latents", *common, *cached.models[8:10], "--num-workers", "0"]) == 0
    assert main(["cache-text", *common, *cached.models[10:]]) == 0
    capsys.readouterr()
    assert dry(cached, tmp_path / "out", f"--dataset-config {config}") == 0
    shown_all = capsys.readouterr()
    rows = [line for line in shown_all.out.splitlines() if str(images)[-20:] in line]
    assert [row.replace("│", " ").split()[-4:] for row in rows] == [
        ["5", "0", "5", "1"],
        ["5", "5", "0", "1"],
    ]
    assert shown_all.err.count("enable_bucket is not given") == 2, "once for each block"


def test_memory_by_part(cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the model in the file, in float32, with adamw's two numbers for each that is trained."""
    assert dry(cached, tmp_path, "--network-dim 512") == 0
    table = shown(capsys.readouterr().out)
    trained = int(table["trained"][0].split()[0].replace(",", ""))
    assert size(table["adapter"][0]) == pytest.approx(4 * trained, abs=2**16)
    assert size(table["gradients"][0]) == pytest.approx(4 * trained, abs=2**16)
    assert size(table["optimizer"][0]) == pytest.approx(8 * trained, abs=2**16)
    dit = Path(cached.models[cached.models.index("--dit") + 1])
    assert size(table["weights"][0]) == pytest.approx(dit.stat().st_size, abs=2**16)


def test_the_parts_of_a_step_are_shown_though_samples_take_more(
    cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("make it red --w 1024 --h 1024 --s 2")
    assert dry(cached, tmp_path, f"--sample-prompts {prompts} --sample-at-first") == 0
    table = shown(capsys.readouterr().out)
    assert size(table["peak"][0]) > size(table["a training step"][0])
    step = [table[part][0] for part in ("weights", "adapter", "gradients", "optimizer")]
    assert 0 < sum(map(size, step)) < size(table["a training step"][0]) + 2**18  # each is rounded


def test_a_run_that_goes_on(cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(cached, tmp_path, "--max-train-steps 2 --save-state --network-args dora=true") == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    going_on = "--max-train-steps 5 --resume auto --network-args dora=true"
    assert dry(cached, tmp_path, going_on) == 0
    assert shown(capsys.readouterr().out)["steps"] == ["5, of which 2 are done"]
    assert dry(cached, tmp_path, f"{going_on} include_patterns=.*mod.*") == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_state_of_another_network(
    cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same settings, but fewer tensors."""
    assert train(cached, tmp_path, "--max-train-steps 2 --save-state") == 0
    path = tmp_path / "edit-state" / "state.safetensors"
    fields, tensors = metadata(path), load_file(path)
    tensors.pop(next(name for name in tensors if name.startswith("adapter.")))
    save_file(tensors, path, fields)
    assert dry(cached, tmp_path, "--max-train-steps 5 --resume auto") == 2
    assert "the state is of another network" in capsys.readouterr().err


def test_a_full_disk(
    cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**5, 10**5))
    assert dry(cached, tmp_path) == 2
    assert "the disk has 0.1 MiB left" in capsys.readouterr().err


def test_caches_of_another_text_encoder(
    cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "data"
    shutil.copytree(cached.config.parent, copy)
    config = copy / "dataset.toml"
    config.write_text(cached.config.read_text().replace(str(cached.config.parent), str(copy)))
    (copy / "cache").rename(copy / "old")
    for path in (copy / "old").iterdir():
        tensors, fields = load_file(path), metadata(path)
        wider = {n: torch.cat((t, t), -1) if n.startswith("t5_vec") else t for n, t in tensors.items()}
        (copy / "cache").mkdir(exist_ok=True)
        save_file(wider, copy / "cache" / path.name, fields)
    assert dry(cached, tmp_path, f"--dataset-config {config}") == 2
    assert "has 64 channels from T5, but the transformer takes 32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("--optimizer-args wrong=1", "--optimizer-args"),
        ("--network-weights {vae}", "expects a LoRA"),
        ("--dit {vae}", "--dit expects a FLUX transformer"),
        ("--sample-prompts {prompts} --text-encoder2 {vae}", "--text-encoder2 expects"),
        ("--sample-prompts {prompts} --tokenizer1 {nowhere}", "--tokenizer1"),
        ("--attn-mode flash", "flash"),
    ],
)
def test_what_would_fail_later(
    cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: str, message: str
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("make it red --w 64 --h 64 --s 2")
    vae = cached.models[cached.models.index("--vae") + 1]
    assert (
        dry(cached, tmp_path / "out", settings.format(vae=vae, prompts=prompts, nowhere=tmp_path / "none"))
        == 2
    )
    assert message in capsys.readouterr().err


def test_the_transformer_itself(cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its weights are trained in float32, and no others are there."""
    where = ["--output-dir", str(tmp_path), "--output-name", "edit"]
    assert main(["train", *cached.models, *where, "--network-module", "none", "--dry-run"]) == 0
    table = shown(capsys.readouterr().out)
    dit = Path(cached.models[cached.models.index("--dit") + 1])
    assert size(table["trained weights"][0]) == pytest.approx(dit.stat().st_size, abs=2**16)
    assert "weights" not in table
