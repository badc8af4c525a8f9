"""Make the host's live module trainable without copying it, and restore it bit for bit.

ComfyUI loads models under `torch.inference_mode()`, so their parameters are inference tensors,
which autograd refuses to save for backward. An alias made outside inference mode over the same
storage is an ordinary tensor. `in_place` swaps such aliases into `_parameters`, `_buffers` and
plain tensor attributes, and puts the original objects back at the end: same storage pointers,
same objects, same `module.__dict__`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class _Slot:
    """One place that holds a tensor: `container[name]`."""

    container: dict[str, Any]
    name: str
    original: Tensor
    alias: Tensor


class InPlace:
    """The swapped entries of some modules. Use through `in_place`."""

    def __init__(self, *modules: nn.Module) -> None:
        self._modules = modules
        self._slots: list[_Slot] = []
        self._alias_of: dict[int, Tensor] = {}  # by id of the original; slots keep those alive
        self._aliases: set[int] = set()

    def refresh(self) -> None:
        """Swap every entry that needs it and is not swapped yet.

        Call it after any host call that can load, patch or unpatch models: the host then
        replaces Parameter objects, and those entries are found here and swapped anew.
        """
        for root in self._modules:
            for module in root.modules():
                self._swap(module._parameters)
                self._swap(module._buffers)
                self._swap(module.__dict__)

    def restore(self) -> None:
        """Put the originals back; an entry that the host has replaced meanwhile is left to it."""
        for slot in self._slots:
            if slot.container.get(slot.name) is slot.alias:
                slot.container[slot.name] = slot.original
        self._slots.clear()
        self._alias_of.clear()
        self._aliases.clear()

    def _swap(self, container: dict[str, Any]) -> None:
        for name, value in list(container.items()):
            if not isinstance(value, Tensor) or id(value) in self._aliases:
                continue
            if not _needs_alias(value):
                continue
            alias = self._alias_of.get(id(value))
            if alias is None:
                alias = self._alias_of[id(value)] = alias_of(value)
                self._aliases.add(id(alias))
            self._slots.append(_Slot(container, name, value, alias))
            container[name] = alias


@contextmanager
def in_place(*modules: nn.Module) -> Iterator[InPlace]:
    """While the context lasts, the modules' tensors can take part in autograd, without a copy.

    Yields the `InPlace`, whose `refresh()` is due after host calls that can load models. Must be
    entered, used and left outside inference mode (`torch.inference_mode(False)`).
    """
    swapped = InPlace(*modules)
    try:
        swapped.refresh()
        yield swapped
    finally:
        swapped.restore()


def alias_of(tensor: Tensor) -> Tensor:
    """An ordinary tensor over the same storage; a frozen Parameter for a Parameter.

    `detach`, `.data` and `view` of an inference tensor stay inference tensors; `set_` does not.
    ComfyUI's quantised tensors (a wrapper around `_qdata` and layout parameters) are rebuilt from
    aliases of their parts, other subclasses keep their class and attributes. Raises RuntimeError
    inside inference mode.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("an alias made inside inference mode would be an inference tensor too")
    if hasattr(tensor, "_qdata"):
        plain = _alias_quantized(tensor)
    else:
        plain = _alias_plain(tensor)
        if type(tensor) not in (Tensor, nn.Parameter):  # GGUF's tensors carry their type this way
            plain = plain.as_subclass(type(tensor))
    alias = plain
    if isinstance(tensor, nn.Parameter):
        alias = nn.Parameter(plain, requires_grad=False)
    for name, value in tensor.__dict__.items():
        alias.__dict__.setdefault(name, value)
    return alias


def _needs_alias(tensor: Any) -> bool:
    if tensor.is_inference() or tensor.requires_grad:
        return True
    return hasattr(tensor, "_qdata") and bool(tensor._qdata.is_inference())


def _alias_plain(tensor: Tensor) -> Tensor:
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    with torch.no_grad():
        return empty.set_(
            tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
        )


def _alias_quantized(tensor: Any) -> Tensor:
    """Rebuild the host's QuantizedTensor, whose fields differ between 0.3.75 and 0.33."""
    data = _alias_plain(tensor._qdata)
    if hasattr(tensor, "_layout_params"):  # 0.3.75: a dict of layout parameters
        parameters = {name: _alias_part(part) for name, part in tensor._layout_params.items()}
        return type(tensor)(data, tensor._layout_type, parameters)
    fields = {
        name: _alias_part(getattr(tensor._params, name))
        for name in tensor._params.__dataclass_fields__
    }
    return type(tensor)(data, tensor._layout_cls, type(tensor._params)(**fields))


def _alias_part(part: Any) -> Any:
    return _alias_plain(part) if isinstance(part, Tensor) else part
