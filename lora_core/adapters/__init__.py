"""The registry of adapter types. A new type is one file and one entry here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .base import Adapter
from .bias import Bias, BiasGain
from .boft import BOFT
from .full import Full
from .glora import GLoRA
from .ia3 import IA3
from .layer import Layer
from .loha import LoHa
from .lokr import LoKr
from .lora import LoRA
from .oft import OFT
from .replacement import Replacement

ADAPTERS: dict[str, type[Adapter]] = {
    cls.name: cls for cls in (LoRA, LoHa, LoKr, Full, OFT, BOFT, IA3, GLoRA)
}

BIASES: dict[str, type[Adapter]] = {cls.name: cls for cls in (Bias, BiasGain)}
# What files have and nobody chooses for a training.
UNREGISTERED: dict[str, type[Adapter]] = {**BIASES, Replacement.name: Replacement}

__all__ = [
    "ADAPTERS",
    "BIASES",
    "UNREGISTERED",
    "Adapter",
    "Bias",
    "BiasGain",
    "Layer",
    "adapter_type",
    "type_of_tensors",
]


def adapter_type(name: str) -> type[Adapter]:
    """The type called `name`; ValueError listing the known ones otherwise."""
    if name not in ADAPTERS:
        raise ValueError(f"unknown adapter type {name!r}; known: {', '.join(sorted(ADAPTERS))}")
    return ADAPTERS[name]


def type_of_tensors(shapes: Mapping[str, Sequence[int]]) -> type[Adapter] | None:
    """The type that tensors of these names and shapes are of, or None."""
    sizes = {name: tuple(shape) for name, shape in shapes.items()}
    return next((cls for cls in ADAPTERS.values() if cls.accepts(sizes)), None)
