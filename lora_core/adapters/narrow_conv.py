"""A convolution to few channels, and its gradients, by the quickest way for its shape.

Convolution kernels are made for hundreds of output channels; the `down` of a LoCon has R. A 1x1
kernel is one product of matrices. So is a K x K one that keeps the size, of all its taps at once:
its K² images of R channels are then shifted and added, which moves less memory than K² shifted
copies of x. On a CPU that is the quicker way for some R (`_shifts_forward`, `_shifts_backward`;
figures in `benchmarks/README.md`). Everything else is torch's convolution.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional

from .layer import Layer

BLOCK = 16  # a CPU's convolution kernels pad the channels to a multiple of this
MIN_POSITIONS = 256  # with fewer, torch's own convolution is the quicker
MAX_NARROW = 64  # channels up to which the gradients in bf16 and fp16 are quicker by shifts


def forward(x: Tensor, weight: Tensor, layer: Layer) -> Tensor:
    """weight ∗ x with the layer's geometry; x (B, I, *S), weight (R, I, *K) of any float dtype."""
    if not (_is_pointwise(layer) or _shifts_forward(x, weight, layer)):
        return convolution(x, weight.to(x.dtype), layer)
    narrow = _rows(weight, x.dtype).expand(x.shape[0], -1, -1)
    result = torch.bmm(narrow, x.flatten(2)).unflatten(2, x.shape[2:])
    return result if _is_pointwise(layer) else _sum_of_shifts(result, layer)


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, layer: Layer, *, wants_x: bool
) -> tuple[Tensor | None, Tensor]:
    """Gradients of x (None unless `wants_x`) and of the weight, in x's dtype; grad (B, R, *S)."""
    if not (_is_pointwise(layer) or _shifts_backward(x, weight, layer)):
        return convolution_backward(grad, x, weight.to(x.dtype), layer, wants_x)
    if _is_pointwise(layer):
        columns, rows = grad.flatten(2), _rows(weight, x.dtype)
    else:
        columns, rows = _shifts(grad, layer), _rows(weight.flip(2, 3), x.dtype)
    grad_x = None
    if wants_x:
        # Into a tensor of x's shape, which owns its storage: see AddLinear.
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        torch.bmm(rows.t().expand(x.shape[0], -1, -1), columns, out=grad_x.flatten(2))
    grad_rows = columns_product(columns, x.flatten(2))  # (R · prod(K), I)
    grad_weight = grad_rows.view(grad.shape[1], *layer.shape[2:], x.shape[1]).movedim(-1, 1)
    return grad_x, grad_weight if _is_pointwise(layer) else grad_weight.flip(2, 3)


def columns_product(narrow: Tensor, wide: Tensor) -> Tensor:
    """The sum over the batch of narrow @ wideᵀ, (B, R, N) and (B, M, N) to (R, M)."""
    if len(wide) == 1:
        return product(narrow[0], wide[0].t())
    return torch.bmm(narrow, wide.transpose(1, 2)).sum(0)


def product(narrow: Tensor, wide: Tensor) -> Tensor:
    """narrow @ wide, (R, N) and (N, M) to (R, M), in the quicker orientation, contiguous or not.

    In float32 a CPU is 1.4 times as fast with the long side in front; in bf16 it is slower.
    """
    if wide.dtype == torch.float32 and wide.device.type == "cpu":
        return torch.mm(wide.t(), narrow.t()).t()
    return torch.mm(narrow, wide)


def convolution(x: Tensor, weight: Tensor, layer: Layer | None) -> Tensor:
    """torch's convolution by `weight` with `layer`'s geometry, or with stride 1 and no padding."""
    axes = weight.ndim - 2
    stride, padding, dilation = _geometry(layer, axes)
    return torch.convolution(x, weight, None, stride, padding, dilation, False, [0] * axes, 1)


def convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, layer: Layer, wants_x: bool
) -> tuple[Tensor | None, Tensor]:
    """Gradients of x (None unless `wants_x`) and of `weight`, whose convolution gave `grad`."""
    axes = weight.ndim - 2
    stride, padding, dilation = _geometry(layer, axes)
    wanted = [wants_x, True, False]
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, [0] * axes, 1, wanted
    )
    return grad_x, grad_weight


def _rows(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(R, I, *K) to (R · prod(K), I) in `dtype`, by one copy at most."""
    turned = weight.movedim(1, -1).to(dtype, memory_format=torch.contiguous_format)
    return turned.reshape(-1, weight.shape[1])


def _geometry(layer: Layer | None, axes: int) -> tuple[list[int], list[int], list[int]]:
    if layer is None:
        return [1] * axes, [0] * axes, [1] * axes
    return list(layer.stride), list(layer.padding), list(layer.dilation)


def _is_pointwise(layer: Layer) -> bool:
    """Whether the convolution is a product of matrices: kernel and stride 1, no padding."""
    kernel = layer.shape[2:]
    return all(size == 1 for size in (*kernel, *layer.stride)) and not any(layer.padding)


def _shifts_forward(x: Tensor, weight: Tensor, layer: Layer) -> bool:
    """Whether to shift and add: where padding R to whole blocks would cost over a quarter more."""
    rank = weight.shape[0]
    return _can_shift(x, layer) and 4 * (-rank % BLOCK) > rank


def _shifts_backward(x: Tensor, weight: Tensor, layer: Layer) -> bool:
    """Whether the gradients are quicker by shifts: in float32 where the result is."""
    if x.dtype == torch.float32:
        return _shifts_forward(x, weight, layer)
    return _can_shift(x, layer) and weight.shape[0] <= MAX_NARROW


def _can_shift(x: Tensor, layer: Layer) -> bool:
    """Whether the kernel is square, 2-D and keeps the size, of an image that is not small.

    Only on a CPU: elsewhere it is not measured.
    """
    size = layer.shape[2]
    return (
        x.device.type == "cpu"
        and layer.shape[2:] == (size, size)
        and size % 2 == 1
        and layer.padding == (size // 2, size // 2)
        and all(step == 1 for step in (*layer.stride, *layer.dilation))
        and x[0, 0].numel() >= MIN_POSITIONS
    )


def _sum_of_shifts(taps: Tensor, layer: Layer) -> Tensor:
    """(B, R · K², H, W) to (B, R, H, W): each tap's image moved to its place, and added up.

    out[b, r, y, x] = Σ over (u, v) of taps[b, r · K² + u · K + v, y + u - K // 2, x + v - K // 2],
    zero outside. Added up in float32 or better.
    """
    size = layer.shape[2]
    images = taps.unflatten(1, (-1, size, size))
    exact = torch.promote_types(taps.dtype, torch.float32)
    out = images[:, :, size // 2, size // 2].to(exact, copy=True)
    for u, v in itertools.product(range(size), repeat=2):
        if (u, v) != (size // 2, size // 2):
            to_y, from_y = _overlap(u - size // 2, out.shape[2])
            to_x, from_x = _overlap(v - size // 2, out.shape[3])
            out[:, :, to_y, to_x] += images[:, :, u, v, from_y, from_x]
    return out.to(taps.dtype)


def _overlap(ahead: int, size: int) -> tuple[slice, slice]:
    """Where an axis of `size` has something `ahead` of it to read, and where that is."""
    here, there = max(0, -ahead), max(0, ahead)
    return slice(here, size - there), slice(there, size - here)


def _shifts(grad: Tensor, layer: Layer) -> Tensor:
    """The transpose of `_sum_of_shifts`, its taps backwards: (B, R, H, W) to (B, R · K², H · W).

    A tap that read ahead in the forward pass gives back: hence the kernel backwards.
    """
    size = layer.shape[2]
    padded = functional.pad(grad, (size // 2,) * 4)
    windows = padded.unfold(2, grad.shape[2], 1).unfold(3, grad.shape[3], 1)
    return windows.flatten(1, 3).flatten(2)
