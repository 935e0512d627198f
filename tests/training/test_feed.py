"""What loads batches, while everything around it is told to end."""

import os
import signal
import time
from multiprocessing import get_context

from kontext.training.feed import _outlive_interrupts


def _loading(ready: object) -> None:
    _outlive_interrupts(0)
    ready.set()
    time.sleep(60)


def test_a_worker_outlives_the_first_signal_but_not_the_second() -> None:
    context = get_context("fork")
    ready = context.Event()
    worker = context.Process(target=_loading, args=(ready,))
    worker.start()
    assert ready.wait(10)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
        worker.join(0.2)
        assert worker.exitcode is None
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == -signal.SIGTERM
