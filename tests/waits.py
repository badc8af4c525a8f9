"""Sees what would make the host wait for the device; on a CPU it takes no time, but is the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operators with a result, or a shape of it, that the host must know before it can go on.
READING_OPERATORS = {
    "_local_scalar_dense",  # item(), bool(), float() and int()
    *("equal", "is_nonzero", "nonzero", "masked_select"),
    *("_unique2", "unique_dim", "unique_consecutive"),
}
# No operators, where the tensor lies on the CPU.
READING_METHODS = {
    function: function.__name__ for function in (Tensor.tolist, Tensor.numpy, Tensor.cpu)
}
Wait = tuple[str, tuple[int, ...]]  # what read, and the shape of the tensor


@contextmanager
def watched_waits() -> Iterator[list[Wait]]:
    """The list of waits, which grows while the context lasts."""
    waits: list[Wait] = []
    with _Methods(waits), _Operators(waits):
        yield waits


class _Operators(TorchDispatchMode):
    def __init__(self, waits: list[Wait]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READING_OPERATORS or (name.startswith("index") and _has_mask(args)):
            self.waits.append((name, tuple(args[0].shape)))
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, waits: list[Wait]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READING_METHODS:
            self.waits.append((READING_METHODS[func], tuple(args[0].shape)))
        return func(*args, **(kwargs or {}))


def _has_mask(args: Any) -> bool:
    """Whether a tensor is indexed by true and false: how many are true decides the shape."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)
