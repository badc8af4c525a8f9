"""The change itself, with no structure: of a weight, or of a norm's weight; `bias` has b's.

    y = (W + diff) x + b

As full fine-tuning; kept as a difference by LyCORIS, https://arxiv.org/abs/2309.14859 (section 4).
Letters as in base.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from .add_change import add_dense
from .base import Adapter, Axes, Built
from .create_options import DEFAULT, CreateOptions
from .fitting import Shape, fitted
from .layer import Layer


class Full(Adapter):
    """ΔW = `diff`, of the weight's shape: (O, I), (O, I, *K), or (C,) of a norm.

    It has no rank of its own: `rank` is the largest that ΔW can have, and alpha is equal to it.
    """

    name: ClassVar[str] = "full"
    help: ClassVar[str] = (
        "every weight and bias itself: files and memory as large as the model's layers."
    )
    forms: ClassVar = (frozenset({"diff"}),)
    has_alpha: ClassVar[bool] = False
    trains_bias: ClassVar[bool] = True

    def __init__(self, diff: Tensor) -> None:
        super().__init__()
        self.shape = tuple(diff.shape)
        self.rank = min(self.shape[0], math.prod(self.shape[1:]))
        self.alpha = float(self.rank)
        self.diff = nn.Parameter(diff)

    @classmethod
    def create(
        cls,
        shape: Shape,
        rank: int,
        alpha: float,
        *,
        options: CreateOptions = DEFAULT,
        generator: torch.Generator | None = None,
    ) -> Full:
        """Zeros. Rank and alpha have no meaning here; raises ValueError for a rank < 1 all same."""
        if rank < 1:
            raise ValueError(f"rank is {rank}; at least 1 is needed, though full does not use it")
        return cls(torch.zeros(shape, dtype=torch.float32))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: Shape) -> Full:
        """See `Adapter.from_tensors`."""
        return cls(fitted(tensors, {"diff": shape})["diff"])

    def tensors(self) -> dict[str, Tensor]:
        return {"diff": self.diff.detach()}

    def row_axes(self) -> Axes:
        return {"diff": (0, 1)}

    def delta(self, weight: Tensor) -> Tensor:
        return self.diff

    def delta_gradients(
        self, weight: Tensor, grad: Tensor, built: Built
    ) -> tuple[Tensor | None, ...]:
        return (grad,)

    def forward(self, x: Tensor, base_out: Tensor, layer: Layer) -> Tensor:
        """On a norm x is its input, and the change scales that input normalised."""
        if len(self.shape) > 1:
            return add_dense(self, x, base_out, layer)
        if layer.normalized is None:
            raise ValueError(f"a change of a norm {self.shape} needs the layer's `normalized`")
        normalized = layer.normalized(x).to(base_out.dtype)
        return base_out + normalized * layer.along_channels(self.diff, base_out)
