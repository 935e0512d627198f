"""SIGKILL at random moments, also while saving, and the same command again: the same files as if never stopped."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from kontext.training.history import read_history
from tests.training.command import words
from tests.training.dataset import Cached
from tests.training.killing import KILLED, Killer, draw

STEPS = 12
COMMON = f"--max-train-steps {STEPS} --save-every-n-steps 2 --save-last-n-steps 2 --save-state --resume auto"
SETTINGS = {
    "everything": (
        "--gradient-accumulation-steps 2 --network-dropout 0.1 --network-args rank_dropout=0.1 module_dropout=0.1 "
        "--ema-decay 0.9 --lr-scheduler cosine --num-timestep-buckets 4"
    ),
    "workers": "--max-data-loader-n-workers 2 --network-dropout 0.1 --optimizer-type adafactor",
    "adamw8bit": "--optimizer-type adamw8bit --optimizer-args min_8bit_size=256",
    "schedulefree": "--optimizer-type adamwschedulefree --gradient-accumulation-steps 2 --network-dropout 0.1",
    "prodigy": "--optimizer-type prodigy --learning-rate 1 --network-dropout 0.1",
    "dora": "--network-args dora=true --save-every-n-epochs 1 --save-last-n-epochs 1 --ema-decay 0.5",
}


@pytest.fixture(scope="module")
def killer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killer]:
    with Killer(tmp_path_factory.mktemp("killer") / "log.txt") as made:
        yield made


def contents(folder: Path) -> dict[str, bytes]:
    """What a run leaves behind, but for its report and history, in which there are times."""
    paths = (path for path in folder.rglob("*") if path.suffix not in (".html", ".jsonl"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in paths}


def kill_often(killer: Killer, cached: Cached, folder: Path, name: str, *, kills: int, seed: int) -> None:
    """Kills runs so many times, each as often as it takes to come to its end, and compares each with a whole one."""
    source = random.Random(seed)
    command = f"{COMMON} {SETTINGS[name]}"
    whole = killer.run(words(cached, folder / "whole", command), folder / "whole")
    assert whole.code == 0, killer.log.read_text()
    run, done = 0, 0
    while done < kills:
        broken = folder / f"broken{run}"
        ended = killer.run(words(cached, broken, command), broken, draw(source, whole))
        done += ended.code == KILLED
        if ended.code != KILLED or done == kills:
            assert killer.run(words(cached, broken, command), broken).code == 0, killer.log.read_text()
            check_same(folder / "whole", broken)
            run += 1


def check_same(whole: Path, broken: Path) -> None:
    expected, found = contents(whole), contents(broken)
    assert sorted(found) == sorted(expected)
    assert [path for path in expected if found[path] != expected[path]] == []
    histories = [read_history(folder / "edit.history.jsonl") for folder in (whole, broken)]
    assert [history.step.tolist() for history in histories] == [list(range(1, STEPS + 1))] * 2
    assert histories[0].loss.tolist() == histories[1].loss.tolist()


@pytest.mark.parametrize("name", ["everything", "schedulefree"])
def test_a_run_killed_at_random_ends_as_if_it_had_not_been(
    name: str, killer: Killer, cached: Cached, tmp_path: Path
) -> None:
    seed = random.randrange(1000)
    print("seed", seed)
    kill_often(killer, cached, tmp_path, name, kills=2, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_killed_many_times_ends_as_if_it_had_not_been(
    name: str, killer: Killer, cached: Cached, tmp_path: Path
) -> None:
    """KILLS says how many times, KILL_SEED from which seed on."""
    kills, first = int(os.environ.get("KILLS", "4")), int(os.environ.get("KILL_SEED", "0"))
    kill_often(killer, cached, tmp_path, name, kills=kills, seed=first)
