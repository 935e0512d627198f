"""The program from outside: what it prints, and its exit codes."""

import os
import shlex
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from torch.utils.data import DataLoader, Dataset

from kontext import __version__, cli, console
from kontext.errors import UserError
from kontext.options import COMMANDS, Command
from kontext.options.base import Options
from kontext.options.cache import CacheLatents
from kontext.options.resolve import resolve
from tests.options.models import Everything

FILES = ["--dit", "d", "--vae", "v"]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """A command `everything` that remembers the options it ran with."""
    seen: list[Options] = []
    _provide(monkeypatch, seen.append)
    return seen


def _provide(monkeypatch: pytest.MonkeyPatch, run: Callable[[Options], None]) -> None:
    module = types.ModuleType("tests.everything")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tests.everything", module)
    monkeypatch.setitem(
        COMMANDS, "do-everything", Command("tests.everything", "tests.options.models:Everything")
    )


@pytest.mark.parametrize(
    "line",
    [
        "--dit d --vae v --lora-weight a b --lora-multiplier -1 0.5 --image-size 64 32 --fp8",
        "--dit=d --ae v --lora_weight a --lora_weight b --lora_multiplier=-1 --lora_multiplier 0.5"
        " --image_size 64 32 --fp8_base --sdpa --shuffle --resize",
    ],
)
def test_every_spelling_gives_the_same_options(ran: list[Options], line: str) -> None:
    assert cli.main(["do_everything", *shlex.split(line)]) == 0
    expected = {
        "dit": "d",
        "vae": "v",
        "lora_weight": ["a", "b"],
        "lora_multiplier": [-1.0, 0.5],
        "image_size": (64, 32),
        "fp8": True,
    }
    assert ran == [Everything(**expected)]


def test_the_command_line_wins_over_the_config_file(ran: list[Options], tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text('dit = "d"\nvae = "file"\nfp8 = true\nshuffle = false\nno-resize = true\nsteps = 9\n')
    given = ["--vae", "line", "--no-fp8", "--shuffle", "--resize"]
    assert cli.main(["do-everything", "--config-file", str(path), *given]) == 0
    (options,) = ran
    assert isinstance(options, Everything)
    assert (options.vae, options.fp8, options.shuffle, options.no_resize) == (
        Path("line"),
        False,
        True,
        False,
    )
    assert options.steps == 9


def test_print_config_writes_toml_to_stdout_and_runs_nothing(
    ran: list[Options], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["do-everything", *FILES, "--steps", "3", "--print-config"]) == 0
    path = tmp_path / "x.toml"
    path.write_text(capsys.readouterr().out)
    assert ran == [] and resolve(Everything, {"config_file": str(path)}).steps == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "error: There is no command 'trian'. Did you mean train?"),
        (["xyz"], "error: There is no command 'xyz'. The commands are cache-latents, cache-text, train"),
        (["--seed", "train"], "error: '--seed' must come after a command: kontext cache-latents | c"),
        (["do-everything"], "error: --vae and --dit must be given."),
        (["do-everything", "--stepz", "3"], "error: There is no option --stepz. Did you mean --steps?"),
        (["do-everything", *FILES, "--steps", "x"], "error: --steps: must be a whole number, not 'x'."),
        (["do-everything", "--config-file", "none.toml"], "error: Cannot read the config file none.toml:"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    ran: list[Options], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith(message)


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (
            UserError("a.png is empty.\nb.png is empty."),
            2,
            "error: a.png is empty.\nerror: b.png is empty.\n",
        ),
        (KeyboardInterrupt(), 130, "Interrupted.\n"),
        (FileNotFoundError(2, "No such file or directory", "a.png"), 2, "error: a.png: No such file or dir"),
        (OSError(28, "No space left on device"), 2, "error: No space left on device.\n"),
        (
            OutOfMemoryError("CUDA out of memory. Tried 2 GiB\nmore"),
            2,
            "error: Out of memory. Try a smaller --image-size. (CUDA out",
        ),
        (MemoryError(), 2, "error: Out of memory."),
        (
            ValueError("bad [x]\nmore"),
            1,
            "error: ValueError: bad [x] (run again with --debug for the traceback)\n",
        ),
        (AssertionError(), 1, "error: AssertionError: no message (run again with --debug"),
        (SystemExit(3), 3, ""),
    ],
)
def test_what_a_command_raises_becomes_a_line_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failure: BaseException,
    code: int,
    message: str,
) -> None:
    def run(options: Options) -> None:
        raise failure

    _provide(monkeypatch, run)
    if isinstance(failure, SystemExit):
        with pytest.raises(SystemExit):
            cli.main(["do-everything", *FILES])
        return
    assert cli.main(["do-everything", *FILES]) == code
    shown = capsys.readouterr().err
    assert shown.startswith(message) and "Traceback" not in shown


def test_advice_for_memory_names_only_options_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        raise OutOfMemoryError("x")

    cli.guarded(run, debug=False, model=Everything)
    assert capsys.readouterr().err == "error: Out of memory. Try a smaller --image-size. (x)\n"


class Dying(Dataset[None]):
    """Whoever reads it is killed, as by a system that has no memory left."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_was_killed_is_no_defect(capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        next(iter(DataLoader(Dying(), num_workers=1)))

    assert cli.guarded(run, debug=False, model=CacheLatents) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(
        "error: A process that reads files has died, most often of memory. Try fewer (--num-workers)"
    )


def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(options: Options) -> None:
        raise UserError("a.png is empty.")

    _provide(monkeypatch, run)
    assert cli.main(["do-everything", *FILES, "--debug"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback") and shown.endswith("\nerror: a.png is empty.\n")


def test_help_shows_groups_choices_defaults_and_brackets(
    ran: list[Options], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_stdout", lambda: Console(width=160))
    assert cli.main(["do-everything", "--help"]) == 0
    text = capsys.readouterr().out
    assert "Usage: kontext do-everything [OPTIONS]\n\nDo everything.\n\nIn detail.\n" in text
    for words in (
        "─ Files ─",
        "Text [in brackets] | with a bar.",
        "Transformer. [required]",
        "[default sdpa] [also --sdpa for sdpa, --flash-attn for flash]",
        "[float32, bfloat16, float16]",
        "--shuffle/--no-shuffle",
        "[>=1, <=100]",
        "--help",
    ):
        assert words in text
    for words in ("--lora_weight", "--no-fp8", "--not-"):
        assert words not in text


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_of_the_program_names_the_commands(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert all(f"│ {name} " in text for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"Usage: kontext {command} [OPTIONS]") and "--config-file" in text


def test_the_module_runs_as_the_program() -> None:
    done = subprocess.run([sys.executable, "-m", "kontext", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"kontext {__version__}\n", "")
    wrong = subprocess.run([sys.executable, "-m", "kontext", "tran"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.endswith("Did you mean train?\n")


# The four command lines of the document that this program covers, with `kontext <command>` for its scripts.
DOCUMENTED = {
    "cache-latents": """
    --dataset_config path/to/toml
    --vae path/to/ae_model
    """,
    "cache-text": """
    --dataset_config path/to/toml
    --text_encoder1 path/to/text_encoder1
    --text_encoder2 path/to/text_encoder2
    --batch_size 16
    """,
    "train": """
    --dit path/to/dit_model
    --vae path/to/ae_model
    --text_encoder1 path/to/text_encoder1
    --text_encoder2 path/to/text_encoder2
    --dataset_config path/to/toml
    --sdpa --mixed_precision bf16
    --timestep_sampling flux_shift --weighting_scheme none
    --optimizer_type adamw8bit --learning_rate 1e-4 --gradient_checkpointing
    --max_data_loader_n_workers 2 --persistent_data_loader_workers
    --network_module networks.lora_flux --network_dim 32
    --max_train_epochs 16 --save_every_n_epochs 1 --seed 42
    --output_dir path/to/output_dir --output_name name-of-lora
    """,
    "generate": """
    --dit path/to/dit_model
    --vae path/to/ae_model
    --text_encoder1 path/to/text_encoder1
    --text_encoder2 path/to/text_encoder2
    --control_image_path path/to/control_image.jpg
    --prompt "A cat"
    --image_size 1024 1024 --infer_steps 25
    --attn_mode sdpa --fp8_scaled
    --save_path path/to/save/dir --output_type images
    --seed 1234 --lora_multiplier 1.0 --lora_weight path/to/lora.safetensors
    """,
}
ALSO_NAMED = {
    "cache-text": "--fp8_t5",
    "train": "--fp8_base --fp8_scaled --fp8_t5 --gradient_checkpointing_cpu_offload --network_args a=b",
    "generate": "--no_resize_control --fp8 --fp8_t5 --include_patterns a.* b --exclude_patterns c --lycoris "
    "--embedded_cfg_scale 2.5 --save_merged_model out.safetensors",
}


@pytest.mark.parametrize("command", DOCUMENTED)
@pytest.mark.parametrize("more", [False, True])
def test_the_documented_command_lines_resolve(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, more: bool
) -> None:
    line = shlex.split(DOCUMENTED[command] + (ALSO_NAMED.get(command, "") if more else ""))
    assert cli.main([command, *line, "--print-config"]) == 0
    printed = capsys.readouterr().out
    path = tmp_path / "x.toml"
    path.write_text(printed)
    assert cli.main([command, "--config-file", str(path), "--print-config"]) == 0
    assert capsys.readouterr().out == printed
