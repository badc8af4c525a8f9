"""Gradients that are right for blocks which write into their inputs.

Many of the host's blocks do `x += ...` (Flux, text encoders). Autograd refuses that where the old
value was saved. Such a step is loud first, and is then taken again under protection: what
autograd has saved is copied before a write.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

PROTECTED: ContextVar[bool] = ContextVar("protected", default=False)
IN_PLACE_ERROR = "modified by an inplace operation"


class Gradients:
    """Runs a forward and backward, and protects against in-place writes once one was seen."""

    def __init__(self) -> None:
        self.protected = False

    def compute(self, forward_backward: Callable[[], Tensor], forget: Callable[[], None]) -> Tensor:
        """The result of `forward_backward()`, which must accumulate gradients by `backward`.

        `forget()` drops the gradients of a try that failed; the second try repeats it all.
        """
        if not self.protected:
            try:
                return forward_backward()
            except RuntimeError as error:
                if IN_PLACE_ERROR not in str(error):
                    raise
            forget()
            self.protected = True
        token = PROTECTED.set(True)
        try:
            with copies_before_writes():
                return forward_backward()
        finally:
            PROTECTED.reset(token)


@contextmanager
def copies_before_writes() -> Iterator[None]:
    """While it lasts, what autograd has saved is copied before anything writes into its memory.

    Like torch's `allow_mutation_on_saved_tensors`, which tells saved tensors by their address and
    so misses writes through a slice (`x[:, 1:] += y` with x saved: a wrong gradient without an
    error, torch 2.13 autograd/graph.py `_get_sid`); and this one nests.
    """
    mode = _CopyBeforeWrite()
    with saved_tensors_hooks(mode.pack, mode.unpack), mode:
        yield


class _Saved:
    """A tensor that autograd keeps; replaced by a copy before its memory is written to."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _CopyBeforeWrite(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._saved: dict[int, weakref.WeakSet[_Saved]] = {}  # by the memory they lie in

    def pack(self, tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        self._saved.setdefault(_memory(tensor), weakref.WeakSet()).add(saved)
        return saved

    def unpack(self, saved: _Saved) -> Tensor:
        return saved.tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for index, name in _written_arguments(func):
            value = args[index] if index < len(args) else kwargs.get(name)
            for tensor in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(tensor, Tensor):
                    self._copy(self._saved.pop(_memory(tensor), ()))
        return func(*args, **kwargs)

    def _copy(self, group: Any) -> None:
        copies: dict[Any, Tensor] = {}  # one for all that saved the same part of the memory
        for saved in group:
            tensor = saved.tensor
            part = (tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())
            if part not in copies:
                copies[part] = tensor.clone()
            saved.tensor = copies[part]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@functools.cache
def _written_arguments(func: Any) -> list[tuple[int, str]]:
    """Position and name of the arguments that an operator writes to."""
    return [
        (index, argument.name)
        for index, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
