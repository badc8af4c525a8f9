"""The host's convolutions as products of matrices, where that is quicker while a CPU trains.

oneDNN lays a convolution's weight out anew at every call, forward and backward. In the deep blocks
of a UNet, where an image has come down to 8x8 positions and a weight has tens of MB, that costs
more than the convolution. The product reads the weight as it lies: see `benchmarks/README.md`.
A 1x1 convolution of one image needs no copy at all: its product is quicker in bf16 at any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

_POINTWISE = {"dilation": (1, 1), "padding": (0, 0), "stride": (1, 1)}
MAX_POSITIONS = 64  # of a batch's output; with more the convolution is the quicker one
HEAVY = 14_000_000  # numbers in a weight whose layout costs more, up to MAX_HEAVY_POSITIONS
MAX_HEAVY_POSITIONS = 256


@contextmanager
def small_convolutions(modules: Sequence[nn.Module]) -> Iterator[None]:
    """While it lasts, Conv2d layers on a CPU compute small outputs by one product.

    Through `_conv_forward`, which the host's own layers (comfy/ops.py) call with the weight that
    is to be used, cast or not; set on the instances and taken off again.
    """
    layers = [
        layer
        for root in modules
        for layer in root.modules()
        if isinstance(layer, nn.Conv2d) and _is_plain(layer)
    ]
    for layer in layers:
        vars(layer)["_conv_forward"] = partial(_forward, layer, layer._conv_forward)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["_conv_forward"]


def _is_plain(layer: nn.Conv2d) -> bool:
    return (
        layer.groups == 1
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and "_conv_forward" not in vars(layer)
    )


def _forward(
    layer: nn.Conv2d,
    convolution: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *more: Any,
    **named: Any,
) -> Tensor:
    """W ∗ x + b, x (B, I, H, W), weight (O, I, K, K): W as (O, I·K²) @ x unfolded (I·K², B·S)."""
    geometry = {name: getattr(layer, name) for name in ("dilation", "padding", "stride")}
    plain = x.ndim == 4 and x.device.type == "cpu" and not (more or named or weight.requires_grad)
    high, wide = _output_size(x, layer.kernel_size, **geometry) if plain else (0, 0)
    pointwise = len(x) == 1 and geometry == _POINTWISE and layer.kernel_size == (1, 1)
    num_positions = x.shape[0] * high * wide
    limit = MAX_HEAVY_POSITIONS if weight.numel() >= HEAVY else MAX_POSITIONS
    is_quicker = num_positions <= limit or (pointwise and x.dtype == torch.bfloat16)
    if num_positions == 0 or not is_quicker:
        return convolution(x, weight, bias, *more, **named)
    columns = x.flatten(2) if pointwise else functional.unfold(x, layer.kernel_size, **geometry)
    columns = columns.transpose(0, 1).flatten(1)  # (B, I·K², S) to (I·K², B·S)
    out = _Product.apply(columns, weight.flatten(1), bias)
    return out.view(-1, x.shape[0], high, wide).transpose(0, 1).contiguous()


class _Product(torch.autograd.Function):
    """rows @ columns + bias for frozen rows (O, N) and bias (O,); columns (N, S)."""

    @staticmethod
    def forward(ctx: Any, columns: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows)
        if bias is None:
            return torch.mm(rows, columns)
        return torch.addmm(bias[:, None], rows, columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        if rows.dtype == torch.float32 or grad.shape[1] > MAX_POSITIONS:
            return torch.mm(rows.t(), grad), None, None
        # In bf16 and narrow, the transposed product is up to 1.6 times as fast.
        return torch.mm(grad.t(), rows).t().contiguous(), None, None


def _output_size(
    x: Tensor,
    kernel: tuple[int, ...],
    *,
    dilation: tuple[int, ...],
    padding: tuple[int, ...],
    stride: tuple[int, ...],
) -> tuple[int, int]:
    high, wide = (
        (x.shape[2 + axis] + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1)
        // stride[axis]
        + 1
        for axis in (0, 1)
    )
    return high, wide
