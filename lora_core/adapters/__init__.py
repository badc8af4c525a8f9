"""The registry of adapter types. A new type is one file and one entry here."""

from __future__ import annotations

from collections.abc import Collection

from .base import Adapter, Layer
from .lora import LoRA

ADAPTERS: dict[str, type[Adapter]] = {cls.name: cls for cls in (LoRA,)}

__all__ = ["ADAPTERS", "Adapter", "Layer", "adapter_type", "type_of_tensors"]


def adapter_type(name: str) -> type[Adapter]:
    """The type called `name`; ValueError listing the known ones otherwise."""
    if name not in ADAPTERS:
        raise ValueError(f"unknown adapter type {name!r}; known: {', '.join(sorted(ADAPTERS))}")
    return ADAPTERS[name]


def type_of_tensors(names: Collection[str]) -> type[Adapter] | None:
    """The type whose required tensors are all among `names`, or None."""
    present = set(names)
    return next((cls for cls in ADAPTERS.values() if cls.required <= present), None)
