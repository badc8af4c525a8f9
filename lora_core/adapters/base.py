"""What every adapter type is, and what it may know of the layer it sits on.

Letters in shapes: O out, I in, R rank, B batch, T tokens, K kernel (one size per spatial axis).
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Facts of one Linear or ConvNd that an adapter needs, apart from the module itself.

    `shape` is the weight's: (O, I) for Linear, (O, I / groups, *K) for a convolution, whose
    `stride`, `padding` and `dilation` have one entry per spatial axis and are empty for Linear.
    `weight()` returns the frozen base weight in a floating dtype; the host bridge dequantises
    there, so an adapter never reads `module.weight`.
    """

    shape: tuple[int, ...]
    weight: Callable[[], Tensor]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1


class Adapter(nn.Module, abc.ABC):
    """A small trained change ΔW of one layer's frozen weight W.

    Class attributes say how a file names it: `required` and `optional` are tensor names without
    the layer's prefix, `has_alpha` tells that "alpha" belongs to them and scales the change.
    """

    name: ClassVar[str]
    required: ClassVar[frozenset[str]]
    optional: ClassVar[frozenset[str]] = frozenset()
    has_alpha: ClassVar[bool] = True

    shape: tuple[int, ...]
    rank: int
    alpha: float

    @classmethod
    @abc.abstractmethod
    def create(
        cls,
        shape: tuple[int, ...],
        rank: int,
        alpha: float,
        *,
        generator: torch.Generator | None = None,
    ) -> Adapter:
        """A new adapter for a weight of `shape`, whose ΔW is zero. float32, on the CPU.

        Raises ValueError for a shape or rank that the type can't hold.
        """

    @classmethod
    @abc.abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Adapter:
        """The adapter that a file holds for a layer of `shape`; names as in `required`.

        Raises ValueError naming every tensor that does not fit, found and expected.
        """

    @abc.abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The named tensors of a file, "alpha" included, detached; the inverse of from_tensors."""

    @abc.abstractmethod
    def delta(self, weight: Tensor) -> Tensor:
        """ΔW in `weight`'s shape, alpha / rank included, in the adapter's own dtype."""

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(U, V) with ΔW.flatten(1) = U @ V exactly, or None where the type has no such form."""
        return None

    @abc.abstractmethod
    def forward(self, x: Tensor, base_out: Tensor, layer: Layer) -> Tensor:
        """`base_out` plus the change applied to `x`. May write into `base_out` in place."""
