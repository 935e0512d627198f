"""An encoder that never waits: for results to come from the GPU, or for files to be on the disk."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")

WRITERS = 4  # a file that is flushed to the disk takes its time, but many can at once
PENDING = 32
"""Files that may wait for the disk: more would fill the memory when it is slower than the encoder."""


class Result:
    """What an encoder returned, which a GPU may still be computing."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def fetched(self) -> Tensor:
        """On the CPU; the first time, this waits."""
        self.tensor = self.tensor.cpu()
        return self.tensor


def one_late(values: Iterable[T]) -> Iterator[T]:
    """Each value when the next one is made: what follows is on its way while the consumer waits for this."""
    values = iter(values)
    for last in values:
        for value in values:
            yield last
            last = value
        yield last


def behind(writes: Iterable[tuple[Callable[[], None], T]]) -> Iterator[T]:
    """Calls the functions in threads while more of them are made; gives each value, in order, when its call is done.

    Raises what a call raises. Calls that have begun are finished in any case.
    """
    waiting: deque[tuple[Future[None], T]] = deque()
    with ThreadPoolExecutor(WRITERS, thread_name_prefix="write") as pool:
        for write, value in writes:
            waiting.append((pool.submit(write), value))
            while len(waiting) > PENDING or (waiting and waiting[0][0].done()):
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())


def _finished(call: Future[None], value: T) -> T:
    call.result()
    return value
