"""SIGKILL at random moments, also while saving, and the same command again: the same files as if never stopped."""

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kontext.training.history import read_history
from tests.tiny import TinyFiles
from tests.training import command, whole
from tests.training.dataset import Cached
from tests.training.killing import Ended, Killer, draw

STEPS = 12
COMMON = f"--max-train-steps {STEPS} --save-every-n-steps 2 --save-last-n-steps 2 --save-state --resume auto"
# The loss on what is held out falls at first and then explodes, so that its best must be remembered to the end.
EXPLODING = "--validate-every-n-steps 1 --learning-rate 1 --lr-warmup-steps 12 --network-args include_patterns=final_layer.*"


@dataclass(frozen=True)
class Setting:
    """What is run, with so many processes.

    whole: the transformer itself is trained, from one file or a folder of several. held: items are held out.
    split: the processes share one model. best_by: the step by which the best validation loss has come.
    """

    options: str
    whole: bool = False
    folder: bool = False
    held: bool = False
    best_by: int = STEPS
    processes: int = 1
    split: bool = False


SETTINGS = {
    "everything": Setting(
        "--gradient-accumulation-steps 2 --network-dropout 0.1 --network-args rank_dropout=0.1 module_dropout=0.1 "
        "--ema-decay 0.9 --lr-scheduler cosine --num-timestep-buckets 4"
    ),
    "workers": Setting("--max-data-loader-n-workers 2 --network-dropout 0.1 --optimizer-type adafactor"),
    "adamw8bit": Setting("--optimizer-type adamw8bit --optimizer-args min_8bit_size=256"),
    "schedulefree": Setting(
        "--optimizer-type adamwschedulefree --gradient-accumulation-steps 2 --network-dropout 0.1"
    ),
    "prodigy": Setting("--optimizer-type prodigy --learning-rate 1 --network-dropout 0.1"),
    "dora": Setting(
        "--network-args dora=true --save-every-n-epochs 1 --save-last-n-epochs 1 --ema-decay 0.5"
    ),
    "validation": Setting(
        f"{EXPLODING} --network-dropout 0.1 --ema-decay 0.5", held=True, best_by=STEPS // 2
    ),
    "whole": Setting("--gradient-accumulation-steps 2 --ema-decay 0.9 --lr-scheduler cosine", whole=True),
    "whole folder, validation": Setting(
        "--validate-every-n-steps 1 --learning-rate 2e-2 --save-every-n-epochs 1 --save-last-n-epochs 1",
        whole=True,
        folder=True,
        held=True,
    ),
    "two": Setting(
        f"{EXPLODING} --network-dropout 0.1 --ema-decay 0.9", held=True, best_by=STEPS // 2, processes=2
    ),
    "two, whole": Setting("--gradient-accumulation-steps 2 --ema-decay 0.9", whole=True, processes=2),
    "two, split": Setting("--ema-decay 0.9", whole=True, folder=True, processes=2, split=True),
}


@pytest.fixture(scope="module")
def killer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killer]:
    with Killer(tmp_path_factory.mktemp("killer") / "log.txt") as made:
        yield made


@dataclass(frozen=True)
class Runs:
    """Runs of one setting."""

    killer: Killer
    setting: Setting
    cached: Cached

    def run(self, output: Path, kill: dict[str, float] | None = None) -> Ended:
        words = (whole if self.setting.whole else command).words
        line = words(self.cached, output, f"{COMMON} {self.setting.options}")
        place = {"ACCELERATE_USE_FSDP": "true"} if self.setting.split else {}
        return self.killer.run(line, output, kill, processes=self.setting.processes, place=place)

    def complete(self, output: Path) -> Ended:
        ended = self.run(output)
        assert set(ended.codes) == {0}, self.killer.log.read_text()
        return ended


@pytest.fixture
def runs(name: str, killer: Killer, cached: Cached, tiny_files: TinyFiles, tmp_path: Path) -> Runs:
    setting = SETTINGS[name]
    if setting.held:
        (tmp_path / "data").mkdir()
        cached = whole.with_validation(cached, tmp_path / "data")
    if setting.folder:
        cached = whole.on(cached, tiny_files, tiny_files.dit_sharded)
    return Runs(killer, setting, cached)


def contents(folder: Path) -> dict[str, bytes]:
    """What a run leaves behind, but for its report and history, in which there are times."""
    paths = (path for path in folder.rglob("*") if path.suffix not in (".html", ".jsonl"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in paths}


def kill_often(runs: Runs, folder: Path, *, kills: int, seed: int) -> None:
    """Kills runs so many times, each as often as it takes to come to its end, and compares each with a whole one."""
    source = random.Random(seed)
    unstopped = runs.complete(folder / "whole")
    if points := read_history(folder / "whole" / "edit.history.jsonl").validation:
        assert min(points, key=lambda point: point.loss).step <= runs.setting.best_by
    run, done, slowest = 0, 0, 0.0
    while done < kills:
        broken = folder / f"broken{run}"
        ended = runs.run(broken, draw(source, unstopped))
        done += ended.killed
        if ended.killed:
            check_the_others(ended, runs.killer.log)
            slowest = max(slowest, ended.alone)
        if not ended.killed or done == kills:
            runs.complete(broken)
            check_same(folder / "whole", broken)
            run += 1
    print(f"{done} kills in {run} runs; the others lived on for at most {slowest:.1f} s")


def check_the_others(ended: Ended, log: Path) -> None:
    """None of them waits for ever; none says that all is well, but for one that was done already."""
    assert not ended.hung, log.read_text()
    if ended.connected:
        assert all(code < 0 or code in (0, 2) for code in ended.codes), log.read_text()


def check_same(whole: Path, broken: Path) -> None:
    expected, found = contents(whole), contents(broken)
    assert sorted(found) == sorted(expected)
    assert [path for path in expected if found[path] != expected[path]] == []
    one, other = [read_history(folder / "edit.history.jsonl") for folder in (whole, broken)]
    assert one.step.tolist() == other.step.tolist() == list(range(1, STEPS + 1))
    assert one.loss.tolist() == other.loss.tolist()
    assert one.validation == other.validation


@pytest.mark.parametrize("name", ["everything", "whole folder, validation", "two"])
def test_a_run_killed_at_random_ends_as_if_it_had_not_been(runs: Runs, tmp_path: Path) -> None:
    seed = random.randrange(1000)
    print("seed", seed)
    kill_often(runs, tmp_path, kills=1, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_killed_many_times_ends_as_if_it_had_not_been(runs: Runs, tmp_path: Path) -> None:
    """KILLS says how many times, KILL_SEED from which seed on."""
    kills, first = int(os.environ.get("KILLS", "4")), int(os.environ.get("KILL_SEED", "0"))
    kill_often(runs, tmp_path, kills=kills, seed=first)
