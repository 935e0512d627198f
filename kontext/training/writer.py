"""Files are written while training goes on: by one thread, in the order in which they are handed over."""

from collections.abc import Callable
from queue import Queue
from threading import Thread
from types import TracebackType

from kontext import console

Job = Callable[[], None]
"""Writes or deletes files; what it writes is its own copy."""

WAITING = 4  # jobs: more copies of the weights are not kept in memory; whoever brings another one waits


class Writer:
    """Enter it before the first job; on leaving, all jobs are done.

    After a job that failed, nothing more is written or deleted, and its error is raised by the next call.
    """

    def __init__(self) -> None:
        self._jobs: Queue[Job | None] = Queue(WAITING)
        self._error: BaseException | None = None
        self._thread: Thread | None = None

    def __enter__(self) -> "Writer":
        return self

    def submit(self, job: Job) -> None:
        """Hand over a job. The thread begins with the first: until then the process may fork."""
        self.check()
        if self._thread is None:
            self._thread = Thread(target=self._work, name="writer", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def check(self) -> None:
        """Raises the error of a job that failed."""
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Until all jobs are done. Raises the error of one that failed."""
        self._jobs.join()
        self.check()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if self._error is None:
                    job()
            except Exception as error:
                self._error = error
            finally:
                self._jobs.task_done()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._jobs.join()
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
        if error is None:
            self.check()
        elif self._error is not None and self._error is not error:
            console.warn(str(self._error))
