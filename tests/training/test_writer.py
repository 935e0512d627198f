import threading

import pytest

from kontext.errors import UserError
from kontext.training.writer import WAITING, Writer


def test_jobs_are_done_in_their_order_by_another_thread() -> None:
    done: list[tuple[int, str]] = []
    with Writer() as writer:
        for number in range(3 * WAITING):
            writer.submit(lambda number=number: done.append((number, threading.current_thread().name)))
        writer.wait()
        assert done == [(number, "writer") for number in range(3 * WAITING)]


def test_whoever_hands_over_a_job_does_not_wait_for_it() -> None:
    free, done = threading.Event(), []
    with Writer() as writer:
        writer.submit(free.wait)
        writer.submit(lambda: done.append("written"))
        assert done == []
        free.set()
    assert done == ["written"]


def test_an_error_is_raised_by_the_next_call_and_stops_what_was_to_follow() -> None:
    free, done = threading.Event(), []

    def fail() -> None:
        free.wait()
        raise UserError("Cannot write a.safetensors: No space left on device.")

    with pytest.raises(UserError, match="No space left"), Writer() as writer:
        writer.submit(fail)
        writer.submit(lambda: done.append("deleted"))
        free.set()
        with pytest.raises(UserError, match="No space left"):
            writer.wait()
        with pytest.raises(UserError, match="No space left"):
            writer.check()
    assert done == []


def test_leaving_waits_and_raises_what_failed() -> None:
    def fail() -> None:
        raise OSError("full")

    with pytest.raises(OSError, match="full"), Writer() as writer:
        writer.submit(fail)


def test_another_error_is_not_hidden_by_that_of_a_job(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise UserError("Cannot write a.safetensors: full.")

    with pytest.raises(KeyboardInterrupt), Writer() as writer:
        writer.submit(fail)
        raise KeyboardInterrupt
    assert "Cannot write a.safetensors" in capsys.readouterr().err


def test_no_thread_before_the_first_job() -> None:
    before = threading.active_count()
    with Writer():
        assert threading.active_count() == before
