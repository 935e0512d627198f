import os
import signal
import time
from collections.abc import Iterator

import pytest

from kontext.training import interrupts
from kontext.training.interrupts import Interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request(number: int) -> None:
    before = signal.getsignal(number)
    with Interrupts() as found:
        assert not found.requested
        os.kill(os.getpid(), number)
        assert found.requested
    assert signal.getsignal(number) is before


@pytest.fixture
def python_handles_interrupts() -> Iterator[None]:
    """As in a program started by hand; whoever starts processes in the background may have them ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_handles_interrupts")
def test_the_second_signal_acts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "ECHO", 0.1)
    with Interrupts(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("python_handles_interrupts")
def test_a_signal_that_comes_twice_at_a_time_is_one() -> None:
    with Interrupts() as found:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert found.requested
