"""How many bytes of tensors are alive, and which operations run: counted from outside."""

import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Within, `now` and `peak` are the bytes of the tensors that were made here. Memory is counted once, views not."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._add((args, kwargs), known=True)
        result = func(*args, **kwargs)
        self._add(result, known=False)
        self.peak = max(self.peak, self.now)
        return result

    def _add(self, values: Any, *, known: bool) -> None:
        """known: it was there before, and does not count."""
        for value in tree_leaves(values):
            if not isinstance(value, Tensor):
                continue
            memory = value.untyped_storage()
            key = memory._cdata
            if key not in self.bytes:
                self.bytes[key] = 0 if known else memory.nbytes()
                self.now += self.bytes[key]
                weakref.finalize(memory, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.bytes.pop(key)


class Calls(TorchDispatchMode, Counter[str]):
    """Within, how often each operation of torch runs, by name."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))
