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
    """Facts of one Linear, ConvNd or norm that an adapter needs, apart from the module itself.

    `shape` is the weight's: (O, I) for Linear, (O, I / groups, *K) for a convolution, whose
    `stride`, `padding` and `dilation` have one entry per spatial axis and are empty for Linear.
    `weight()` returns the frozen base weight in a floating dtype, `bias()` its bias or None; the
    host bridge dequantises there, so an adapter never reads `module.weight`.

    A norm's shape is (C,), and so is a bias's. Its `channel_axis` is the axis of the output that
    has the channels; `normalized(x)` is a norm's input normalised, before weight and bias.
    """

    shape: tuple[int, ...]
    weight: Callable[[], Tensor]
    bias: Callable[[], Tensor | None] = _no_bias
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    channel_axis: int = -1
    normalized: Callable[[Tensor], Tensor] | None = None

    @property
    def is_linear(self) -> bool:
        return len(self.shape) == 2

    @property
    def fan_in(self) -> int:
        """I · prod(K), the columns of the flattened weight."""
        return math.prod(self.shape[1:])

    def along_channels(self, vector: Tensor, out: Tensor) -> Tensor:
        """A vector (O,) in the dtype of the layer's output `out`, to be broadcast over it."""
        axis = (1 if len(self.shape) > 2 else self.channel_axis) % out.ndim
        return vector.to(out.dtype).view(-1, *[1] * (out.ndim - 1 - axis))
