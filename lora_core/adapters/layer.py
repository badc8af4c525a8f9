"""What an adapter may know of the layer it sits on.

Letters in shapes: O out, I in, R rank, B batch, T tokens, K kernel (one size per spatial axis).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


def _no_bias() -> None:
    return None


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """Facts of one Linear or ConvNd that an adapter needs, apart from the module itself.

    `shape` is the weight's: (O, I) for Linear, (O, I / groups, *K) for a convolution, whose
    `stride`, `padding` and `dilation` have one entry per spatial axis and are empty for Linear.
    `weight()` returns the frozen base weight in a floating dtype, `bias()` its bias or None; the
    host bridge dequantises there, so an adapter never reads `module.weight`.
    """

    shape: tuple[int, ...]
    weight: Callable[[], Tensor]
    bias: Callable[[], Tensor | None] = _no_bias
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def is_linear(self) -> bool:
        return len(self.shape) == 2

    @property
    def fan_in(self) -> int:
        """I · prod(K), the columns of the flattened weight."""
        return math.prod(self.shape[1:])
