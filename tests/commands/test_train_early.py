"""What `kontext train` refuses before it loads a model, and so in a dry run too."""

from pathlib import Path

import pytest

from kontext.cli import main
from tests.tiny import TinyFiles
from tests.training import whole
from tests.training.command import train, words
from tests.training.dataset import Cached

NARROW = "--timestep-sampling logsnr --logit-std 0.01 --max-timestep 1 --preserve-distribution-shape"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (NARROW, "nothing between 0 and 0.001"),
        ("--scale-weight-norms 1 --network-args dora=true", "--scale-weight-norms: a DoRA"),
        (
            "--scale-weight-norms 1 --optimizer-type adamwschedulefree",
            "--scale-weight-norms: adamwschedulefree",
        ),
        ("--ema-decay 0.9 --optimizer-type adamwschedulefree", "--ema-decay: adamwschedulefree averages"),
        ("--optimizer-type torch.optim.LBFGS", "LBFGS: cannot take a step here"),
        ("--optimizer-type torch.optim.SparseAdam", "does not support dense gradients"),
        ("--optimizer-args wrong=1", "--optimizer-args"),
        (
            "--lr-scheduler cosine --lr-scheduler-args min_lr=1",
            "--lr-scheduler-args: cosine has no argument min_lr",
        ),
        ("--lr-scheduler-type Nowhere", "--lr-scheduler-type Nowhere: cannot be imported"),
        ("--logging-dir {file}/logs", "--logging-dir {file}/logs: cannot be written to"),
        ("--logging-dir {folder} --log-tracker-config {file}", "--log-tracker-config {file}: "),
        ("--network-weights {folder}/none", "--network-weights: there is no file or folder {folder}/none"),
        ("--base-weights {folder}/none", "--base-weights: there is no file or folder {folder}/none"),
        ("--base-weights {file}", "{file}"),
        ("--network-weights {file}", "{file}"),
        ("--network-args rank_patterns=nothing.*=4", "'nothing.*'"),
    ],
)
@pytest.mark.parametrize("dry", ["", "--dry-run"])
def test_no_model_is_loaded_for_nothing(
    cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: str, message: str, dry: str
) -> None:
    file = tmp_path / "file"
    file.write_text("[wandb")
    places = {"file": file, "folder": tmp_path}
    assert train(cached, tmp_path / "out", f"{dry} {settings.format(**places)}") == 2
    told = capsys.readouterr().err
    assert message.format(**places) in told and "Loading" not in told


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("conv_dim=4 verbose=True", "conv_dim, verbose left out"),
        ("exclude_patterns=sinle_blocks.*", "exclude_patterns: 'sinle_blocks.*' matches nothing"),
        (
            "include_patterns=['.*img_mod.*','double.*mlp.*']",
            "what 'double.*mlp.*' matches is trained anyway",
        ),
        ("include_patterns=double.* exclude_patterns=.*", ""),
        ("include_patterns=double.* --network-module none", ""),
        (
            "include_patterns=['double.*','sinle.*'] --network-module none",
            "include_patterns: 'sinle.*' matches nothing",
        ),
    ],
)
def test_what_does_nothing_is_told(
    cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str], argument: str, message: str
) -> None:
    network = "--network-dim 4 " * ("none" not in argument)
    line = words(cached, tmp_path / "out", f"--dry-run {network}--network-args {argument}")
    if not network:  # the rank that all tests give
        place = line.index("--network-dim")
        del line[place : place + 2]
    assert main(line) == 0
    told = [
        text for text in capsys.readouterr().err.splitlines() if "_patterns" in text or "left out" in text
    ]
    assert len(told) == bool(message) and message in "".join(told)


def test_sizes_are_taken_from_one_place(
    cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = f"--network-weights {tmp_path} --dim-from-weights --network-args rank_patterns=double.*=2"
    assert train(cached, tmp_path / "out", weights) == 2
    assert "leave out rank_patterns" in capsys.readouterr().err


def test_arguments_that_a_logger_does_not_have(
    cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "trackers.toml"
    config.write_text("[tensorboard]\nwrong = 1\n")
    logs = f"--logging-dir {tmp_path}/logs --log-tracker-config {config}"
    assert train(cached, tmp_path / "out", f"--max-train-steps 1 {logs}") == 2
    assert f"--log-tracker-config {config}: " in capsys.readouterr().err


def test_prompts_of_which_none_is_drawn(
    cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("make it red --w 64 --h 64 --s 2")
    assert train(cached, tmp_path / "out", f"--max-train-steps 1 --sample-prompts {prompts}") == 0
    told = capsys.readouterr().err
    assert "--sample-prompts: no sample is drawn without" in told and "Encoding" not in told


def test_what_lies_in_the_place_of_the_files_of_a_run(
    cached: Cached, tiny_files: TinyFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of weights would be deleted with all that is in it for a new one, at the end of the run."""
    (tmp_path / "a" / "edit.safetensors").mkdir(parents=True)
    assert train(cached, tmp_path / "a", "--dry-run") == 2
    assert "edit.safetensors is something else" in capsys.readouterr().err
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "sample").touch()
    assert train(cached, tmp_path / "b", "--dry-run") == 2
    assert "sample is a file" in capsys.readouterr().err

    folder = whole.on(cached, tiny_files, tiny_files.dit_sharded)
    thesis = tmp_path / "c" / "edit" / "thesis.pdf"
    thesis.parent.mkdir(parents=True)
    thesis.touch()
    assert whole.train(folder, tmp_path / "c", "--max-train-steps 1") == 2
    assert "edit is a folder with other things in it" in capsys.readouterr().err and thesis.exists()
    thesis.unlink()
    for _ in range(2):  # into an empty folder, and over what the run before has written
        assert whole.train(folder, tmp_path / "c", "--max-train-steps 1") == 0


@pytest.mark.parametrize("dry", ["", "--dry-run"])
def test_adapters_that_are_given_are_told_of_once(
    cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str], dry: str
) -> None:
    assert train(cached, tmp_path, "--max-train-steps 1") == 0
    trained = next(tmp_path.glob("*.safetensors"))
    start, base = (tmp_path / name for name in ("start.safetensors", "base.safetensors"))
    for copy in (start, base):
        copy.write_bytes(trained.read_bytes())
    capsys.readouterr()
    settings = f"{dry} --max-train-steps 1 --network-weights {start} --base-weights {base}"
    assert train(cached, tmp_path / "again", settings) == 0
    told = capsys.readouterr().err
    assert told.count(f"{start}: LoRA") == told.count(f"{base}: LoRA") == 1
    assert told.count(f"Starting from {start}") == 1
