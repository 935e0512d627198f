"""The benchmarks run, at sizes at which they say nothing about speed."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "benchmarks"))


def rows(table: str) -> dict[str, list[str]]:
    """The cells of each line of a Markdown table, by the first."""
    lines = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| ")]
    return {first.strip(): [cell.strip() for cell in rest] for first, *rest in lines}


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import files

    files.main(["--gigabytes", "0.01", "--rounds", "1", "--rank", "4", "--folder", str(tmp_path)])
    found = rows(capsys.readouterr().out)
    assert [name.split(",")[0] for name in found][1:] == [
        "merge", "load", "load to fp8", "load to fp8 with scales", "load to int8",
    ]  # fmt: skip
    assert not list(tmp_path.iterdir())


FEW = {"rates": "rates", "generation": "G1 G2", "peaks": "G9"}
MORE = {
    "training": "G6 G7", "fp8": "G4", "profile": "profile", "cards": "cards", "fp8-training": "G8",
    "streaming": "G10", "encoders": "G12", "loading": "G13",
}  # fmt: skip


@pytest.mark.parametrize(
    "wanted", [FEW, pytest.param(FEW | MORE, marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_gpu_script(tmp_path: Path, capsys: pytest.CaptureFixture[str], wanted: dict[str, str]) -> None:
    """Rows at tiny sizes on the CPU: none fails, and what is written is complete after each."""
    import gpu

    results = gpu.main(["--quick", "--out", str(tmp_path), "--rows", *wanted])
    assert results.faults == {}
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert [line["row"] for line in written["lines"]] == [line.row for line in results.lines]
    assert set(wanted.values()) <= {line.row for line in results.lines}
    step = next(line for line in results.lines if line.row == "G1 G2")
    assert float(step.note.split()[3].rstrip(";")) < 1e-5, "our step and diffusers' agree"
    assert (tmp_path / "gpu.md").read_text().count("\n| ") == len(results.lines) + 2, (
        "a heading, and a line each"
    )
    assert capsys.readouterr().out.count("\n| G9 ") == 5


def test_a_row_that_fails_or_takes_too_long_ends_nothing(tmp_path: Path, monkeypatch) -> None:
    import gpu
    from bench import Line

    def slow(_: object):
        yield Line("A", "first")
        time.sleep(5)
        yield Line("A", "second")

    def broken(_: object):
        raise ValueError("no")

    monkeypatch.setattr(gpu, "ROWS", {"slow": (slow, 0.01), "broken": (broken, 1)})
    monkeypatch.setattr(gpu, "bench_of", lambda _: SimpleNamespace(device=torch.device("cpu")))
    monkeypatch.setattr(gpu, "title_of", lambda _: "title")
    results = gpu.main(["--quick", "--out", str(tmp_path)])
    assert [line.what for line in results.lines if line.row == "A"] == ["first"]
    assert "TooLong" in results.faults["slow"] and "ValueError: no" in results.faults["broken"]
    assert json.loads((tmp_path / "gpu.json").read_text())["lines"][0]["what"] == "first"


def test_a_second_run_goes_on_where_the_first_ended(tmp_path: Path, monkeypatch) -> None:
    import gpu
    from bench import Line

    runs: list[str] = []
    broken, title = ["B"], ["this card"]

    def row(name: str):
        def run(_: object):
            runs.append(name)
            yield Line(name, "a step", 1.5, limit=1.0)
            if name in broken:
                raise ValueError("no")

        return run

    def measured(*words: str) -> list[str]:
        runs.clear()
        gpu.main(["--quick", "--out", str(tmp_path), *words])
        return list(runs)

    monkeypatch.setattr(gpu, "ROWS", {name: (row(name), 1) for name in "ABC"})
    monkeypatch.setattr(gpu, "bench_of", lambda _: SimpleNamespace(device=torch.device("cpu")))
    monkeypatch.setattr(gpu, "title_of", lambda _: title[0])
    assert measured("--rows", "A", "B") == ["A", "B"]
    assert "ValueError: no" in json.loads((tmp_path / "gpu.json").read_text())["faults"]["B"]
    broken.clear()
    assert measured() == ["B", "C"]
    assert measured("--rows", "A") == ["A"]
    written = json.loads((tmp_path / "gpu.json").read_text())
    lines = [(line["row"], line["of_limit"]) for line in written["lines"] if line["part"] in "ABC"]
    assert sorted(lines) == [("A", 1.5), ("B", 1.5), ("C", 1.5)] and written["faults"] == {}
    title[0] = "another card"
    with pytest.raises(SystemExit):
        measured()
