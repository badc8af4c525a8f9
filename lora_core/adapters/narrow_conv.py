"""A convolution to few channels, and its gradients, by the quickest way for its shape.

Convolution kernels are made for hundreds of output channels; the `down` of a LoCon has R. A 1x1
kernel is one product of matrices. So is a K x K one that keeps the size, of all its taps at once:
its K² images of R channels are then shifted and added, which moves less memory than K² shifted
copies of x. Measured in `benchmarks/README.md`. Everything else is torch's convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .layer import Layer

MAX_FLOAT32_POSITIONS = 256  # with more, torch's own convolution is the quicker in float32


def forward(x: Tensor, weight: Tensor, layer: Layer) -> Tensor:
    """weight ∗ x with the layer's geometry; x (B, I, *S), weight (R, I, *K) of any float dtype."""
    if not (_is_pointwise(layer) or _is_shifted(x, layer)):
        return convolution(x, weight.to(x.dtype), layer)
    narrow = _rows(weight, x.dtype).expand(x.shape[0], -1, -1)
    result = torch.bmm(narrow, x.flatten(2)).unflatten(2, x.shape[2:])
    return result if _is_pointwise(layer) else _sum_of_shifts(result, layer)


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, layer: Layer, *, wants_x: bool
) -> tuple[Tensor | None, Tensor]:
    """Gradients of x (None unless `wants_x`) and of the weight, in x's dtype; grad (B, R, *S)."""
    if not (_is_pointwise(layer) or _is_shifted(x, layer)):
        return convolution_backward(grad, x, weight.to(x.dtype), layer, wants_x)
    columns = grad.flatten(2) if _is_pointwise(layer) else _shifts(grad, layer)
    grad_x = None
    if wants_x:
        # Into a tensor of x's shape, which owns its storage: see AddLinear.
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        narrow = _rows(weight, x.dtype).t().expand(x.shape[0], -1, -1)
        torch.bmm(narrow, columns, out=grad_x.flatten(2))
    rows = columns_product(columns, x.flatten(2))  # (R · prod(K), I)
    return grad_x, rows.view(grad.shape[1], *layer.shape[2:], x.shape[1]).movedim(-1, 1)


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


def _is_shifted(x: Tensor, layer: Layer) -> bool:
    """Whether to shift and add: a square 2-D kernel that keeps the size, where it is quicker.

    Only on a CPU: elsewhere it is not measured.
    """
    size = layer.shape[2]
    return (
        x.device.type == "cpu"
        and layer.shape[2:] == (size, size)
        and size % 2 == 1
        and layer.padding == (size // 2, size // 2)
        and all(step == 1 for step in (*layer.stride, *layer.dilation))
        and (x.dtype != torch.float32 or x[0, 0].numel() <= MAX_FLOAT32_POSITIONS)
    )


def _sum_of_shifts(taps: Tensor, layer: Layer) -> Tensor:
    """(B, R · K², H, W) to (B, R, H, W): each tap's image moved to its place, and added up.

    out[b, r, y, x] = Σ over (u, v) of taps[b, r · K² + u · K + v, y + u - K // 2, x + v - K // 2],
    zero outside.
    """
    size = layer.shape[2]
    padded = functional.pad(taps, (size // 2,) * 4)
    batch, channels, high, wide = padded.shape
    image = high * wide
    in_place = padded.as_strided(
        (batch, channels // size**2, size, size, *taps.shape[2:]),
        (channels * image, size**2 * image, size * image + wide, image + 1, wide, 1),
    )
    return in_place.sum((2, 3))


def _shifts(grad: Tensor, layer: Layer) -> Tensor:
    """The transpose of `_sum_of_shifts`: (B, R, H, W) to (B, R · K², H · W)."""
    size = layer.shape[2]
    padded = functional.pad(grad, (size // 2,) * 4)
    # A tap that read ahead in the forward pass gives back: hence the kernel backwards.
    taps = [
        padded[:, :, size - 1 - u :, size - 1 - v :][:, :, : grad.shape[2], : grad.shape[3]]
        for u in range(size)
        for v in range(size)
    ]
    return torch.stack(taps, 2).flatten(1, 2).flatten(2)
