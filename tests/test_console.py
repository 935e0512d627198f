"""What is printed, where, and how a progress looks in a file and on a terminal."""

import io

import pytest
from rich.console import Console

from kontext import console

LONG = "/a/very/long/path/" + "x" * 200


def test_messages_go_to_stderr_on_one_line_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    console.say(f"Saved {LONG} [1/2]")
    console.notice("[bold]rounded[/bold] :smile:")
    console.warn("careful")
    console.error("it ends")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        f"Saved {LONG} [1/2]",
        "note: [bold]rounded[/bold] :smile:",
        "warning: careful",
        "error: it ends",
    ]


def test_remarks_of_a_silent_process_can_be_said_by_another(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_process", lambda: 1)
    with console.overheard() as outer:
        console.notice("rounded")
        with console.overheard() as inner:
            console.warn("careful")
        console.say("done")
    console.notice("later")
    assert capsys.readouterr().err == ""
    assert [remark.text for remark in outer] == ["rounded", "careful"] and inner == outer[1:]
    monkeypatch.setattr(console, "_process", lambda: 0)
    for remark in outer:
        console.remark(remark)
    assert capsys.readouterr().err.splitlines() == ["note: rounded", "warning: careful"]


def test_what_was_asked_for_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    console.output(f'x = "{LONG} [a]"')
    assert capsys.readouterr().out == f'x = "{LONG} [a]"\n'


def test_a_table_in_a_file_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    console.table("Skipped", ("file", "count"), [(LONG, 3), ("[b]", 12)], asked=True)
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out.startswith("Skipped")
    assert LONG in captured.out and "[b]" in captured.out
    assert "│     3 │" in captured.out and "│    12 │" in captured.out
    console.table("Empty", ("file", "count"), [])
    assert "file" in capsys.readouterr().err


def test_only_the_first_process_talks_but_each_may_say_why_it_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    console.say("hello")
    console.output("hello")
    with console.progress("Encode", 1) as bar:
        bar.advance()
    console.error("no such file")
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "error (process 1): no such file\n"


def test_progress_in_a_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.progress("train", 100, unit="step", done=20) as bar:
        for step in range(40):
            now[0] += 1
            bar.advance(2, note=f"loss {step}")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 8, "one line in five seconds, the last of them at the end"
    assert lines[0] == "train: 30/100  2.00 step/s  0:35 left  loss 4"
    assert lines[-1] == "train: 100/100  2.00 step/s  0:00 left  loss 39"


def test_the_last_state_is_shown_once_and_an_error_does_not_hide_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with pytest.raises(ValueError), console.progress("train", 9000, unit="step") as bar:
        now[0] += 2
        bar.advance()
        raise ValueError
    assert capsys.readouterr().err == "train: 1/9000  2.00 s/step  4:59:58 left\n"
    with console.progress("train", 3):
        pass
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=120, color_system=None)
    monkeypatch.setattr(console, "_stderr", lambda: terminal)
    with console.progress("Encoding [x]", 4, unit="picture") as bar:
        bar.advance(3, note="[a].png")
        console.say("a line above")
        bar.advance()
    text = screen.getvalue()
    assert "a line above\n" in text
    last = text.splitlines()[-2]
    assert "Encoding [x]" in last and "4/4" in last
