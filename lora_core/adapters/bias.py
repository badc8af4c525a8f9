"""Changes of a layer's bias: the difference itself, or a gain of it.

    y = W x + (b + diff_b)        y = W x + (1 + ia3_b) ∘ b

Neither is offered alone. `Bias` goes with any type (LyCORIS, https://arxiv.org/abs/2309.14859,
section 4); `BiasGain` with an `IA3` of PEFT, which scales a layer's whole output.
Letters as in base.py.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from .base import Adapter, Axes
from .create_options import DEFAULT, CreateOptions
from .fitting import Shape, fitted
from .layer import Layer

if TYPE_CHECKING:
    from typing_extensions import Self


class BiasChange(Adapter):
    """A change of a bias by one number for each output: `diff` (O,), called `tensor` in files.

    Its layer is that of the weight or one of shape (O,) that tells the `channel_axis`.
    """

    tensor: ClassVar[str]
    has_alpha: ClassVar[bool] = False

    def __init__(self, diff: Tensor) -> None:
        super().__init__()
        self.shape = tuple(diff.shape)
        self.rank, self.alpha = 1, 1.0
        self.diff = nn.Parameter(diff)

    @classmethod
    def create(
        cls,
        shape: Shape,
        rank: int = 1,
        alpha: float = 1.0,
        *,
        options: CreateOptions = DEFAULT,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Zeros for a bias of `shape` (O,). Raises ValueError for another number of axes."""
        if len(shape) != 1:
            raise ValueError(f"a bias has one axis, not the shape {tuple(shape)}")
        return cls(torch.zeros(shape, dtype=torch.float32))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: Shape) -> Self:
        """See `Adapter.from_tensors`; `shape` is (O,)."""
        return cls(fitted(tensors, {cls.tensor: shape})[cls.tensor])

    def tensors(self) -> dict[str, Tensor]:
        return {self.tensor: self.diff.detach()}

    def row_axes(self) -> Axes:
        return {self.tensor: (0, 1)}

    @abc.abstractmethod
    def delta(self, weight: Tensor) -> Tensor:
        """The change of the bias, which is `weight` here; it counts where `needs_weight`."""


class Bias(BiasChange):
    """Δb = `diff_b`."""

    name: ClassVar[str] = "bias"
    help: ClassVar[str] = "the biases."
    tensor: ClassVar[str] = "diff_b"
    forms: ClassVar = (frozenset({"diff_b"}),)

    def delta(self, weight: Tensor) -> Tensor:
        return self.diff

    def forward(self, x: Tensor, base_out: Tensor, layer: Layer) -> Tensor:
        return base_out + layer.along_channels(self.diff, base_out)


class BiasGain(BiasChange):
    """Δb = `ia3_b` ∘ b."""

    name: ClassVar[str] = "bias gain"
    tensor: ClassVar[str] = "ia3_b"
    forms: ClassVar = (frozenset({"ia3_b"}),)

    @property
    def needs_weight(self) -> bool:
        return True

    def delta(self, weight: Tensor) -> Tensor:
        return self.diff * weight

    def forward(self, x: Tensor, base_out: Tensor, layer: Layer) -> Tensor:
        bias = layer.bias()
        assert bias is not None, "a gain of a bias sits on a layer without one"
        change = self.delta(bias.to(self.diff.device, self.diff.dtype))
        return base_out + layer.along_channels(change, base_out)
