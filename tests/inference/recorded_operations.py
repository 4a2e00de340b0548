"""A CUDA graph in small, for the CPU: it records what PyTorch's operations were called with, tensors by their memory,
and repeats the very same calls.

So it shares what is dangerous about a graph. Nothing of Python runs again: a length that the host knew is burned in, a
weight that was replaced is still read at its old place. What would make a device wait for the host is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

READ_BACK = {"_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "unique"}
"""Operations whose result, or whose result's shape, the host has to wait for."""


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        assert name not in READ_BACK, f"{name} waits for the device"
        result = func(*args, **kwargs)
        given = {storage_of(leaf) for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)}
        made = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]

        def again() -> None:
            for old, new in zip(made, tree_flatten(func(*args, **kwargs))[0], strict=True):
                if storage_of(old) not in given:  # else a view of what was given, or that itself, written in place
                    old.copy_(new)

        self.calls.append(again)
        return result


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class RecordedOperations:
    """A `Recorder`; `recorded` counts."""

    def __init__(self) -> None:
        self.recorded = 0
        self.times_forgotten = 0

    def forget(self) -> None:
        self.times_forgotten += 1

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        recording = _Recording()
        with recording:
            work()

        def repeat() -> None:
            for call in recording.calls:
                call()

        return repeat


class PlainCalls(RecordedOperations):
    """A `Recorder` that calls the work again."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        work()
        return work
