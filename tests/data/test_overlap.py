"""The encoder goes on while results are fetched and files are written."""

import threading
import time

import pytest
import torch

from kontext.data import overlap
from kontext.data.overlap import Result, behind, one_late
from kontext.errors import UserError


def test_the_next_is_made_before_the_last_is_given():
    made = []

    def make():
        for number in range(4):
            made.append(number)
            yield number

    seen = [(value, len(made)) for value in one_late(make())]
    assert seen == [(0, 2), (1, 3), (2, 4), (3, 4)]
    assert list(one_late([])) == []


def test_values_come_in_order_when_their_calls_are_done():
    """Later calls are done first; all run at once, as the barrier shows."""
    together, done = threading.Barrier(overlap.WRITERS, timeout=10), []

    def call(number):
        together.wait()
        time.sleep(0.01 * (8 - number))
        done.append(number)

    calls = ((lambda number=number: call(number), number) for number in range(2 * overlap.WRITERS))
    for count, value in enumerate(behind(calls)):
        assert value == count and value in done


def test_what_waits_is_bounded(monkeypatch):
    monkeypatch.setattr(overlap, "PENDING", 3)
    gate, begun = threading.Event(), []

    def calls():
        for number in range(20):
            begun.append(number)
            yield gate.wait, number

    threading.Timer(0.1, gate.set).start()
    assert next(behind(calls())) == 0
    assert begun == [0, 1, 2, 3]


def test_a_failure_is_raised_and_what_has_begun_is_finished():
    done = []

    def fail():
        raise UserError("a.png: its latents contain NaN")

    calls = [(lambda: done.append(0), 0), (fail, 1), (lambda: (time.sleep(0.05), done.append(2)), 2)]
    found = []
    with pytest.raises(UserError, match="NaN"):
        for value in behind(calls):
            found.append(value)
    assert found == [0] and done == [0, 2]


def test_a_result_is_fetched_once(monkeypatch):
    result, fetched = Result(torch.arange(3.0)), []
    plain = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: fetched.append(1) or plain(self) + 0)
    first = result.fetched()
    assert torch.equal(first, torch.arange(3.0)) and len(fetched) == 1
    assert torch.equal(result.fetched(), first)
