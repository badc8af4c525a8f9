"""A weight replaced by another, as control LoRAs of Flux have it for the norms. Read only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from .base import Adapter
from .create_options import DEFAULT, CreateOptions
from .fitting import Shape, fitted
from .layer import Layer


class Replacement(Adapter):
    """ΔW = `set_weight` - W, of the weight's shape.

    The host replaces the weight at any strength (comfy/lora.py "set"); here it goes that share of
    the way, which at 1 is the same. Not offered for training, so not registered.
    """

    name: ClassVar[str] = "set"
    help: ClassVar[str] = "another weight in the place of the model's."
    forms: ClassVar = (frozenset({"set_weight"}),)
    has_alpha: ClassVar[bool] = False

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.shape = tuple(value.shape)
        self.rank, self.alpha = 1, 1.0
        self.value = nn.Parameter(value)

    @classmethod
    def create(
        cls,
        shape: Shape,
        rank: int,
        alpha: float,
        *,
        options: CreateOptions = DEFAULT,
        generator: torch.Generator | None = None,
    ) -> Replacement:
        """ValueError: there is no zero change without the weight."""
        raise ValueError("a replaced weight can't be trained")

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: Shape) -> Replacement:
        """See `Adapter.from_tensors`."""
        return cls(fitted(tensors, {"set_weight": shape})["set_weight"])

    def tensors(self) -> dict[str, Tensor]:
        return {"set_weight": self.value.detach()}

    @property
    def needs_weight(self) -> bool:
        return True

    def delta(self, weight: Tensor) -> Tensor:
        return self.value - weight

    def forward(self, x: Tensor, base_out: Tensor, layer: Layer) -> Tensor:
        """On a norm x is its input, and the change scales that input normalised."""
        if len(self.shape) > 1 or layer.normalized is None:
            return super().forward(x, base_out, layer)
        change = self.delta(self.weight_of(layer))
        normalized = layer.normalized(x).to(base_out.dtype)
        return base_out + normalized * layer.along_channels(change, base_out)
