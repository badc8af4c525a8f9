"""Apply a Kronecker product to a layer's input without building it: the vec trick.

    (w1 ⊗ w2) x = w1 · X · w2ᵀ,   X being x as a matrix (M, N) at each position

A convolution does the same with w2 ∗ on each of the M groups of channels. Letters as in lokr.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layer import Layer
from .low_rank import AddProduct
from .narrow_conv import convolution, convolution_backward, product

Block = tuple[Tensor, Tensor | None]  # (left, right) of a product, or (whole, None)


def kron(first: Tensor, second: Tensor) -> Tensor:
    """The Kronecker product of two matrices; torch's refuses transposed ones of a single row."""
    blocks = first[:, None, :, None] * second[None, :, None, :]
    return blocks.flatten(2).flatten(0, 1)


def cost_per_position(w1: Block, w2: Block) -> int:
    """Multiplications for one position, w2 first."""
    rows1, columns1 = w1[0].shape[0], (w1[0] if w1[1] is None else w1[1]).shape[1]
    left, right = w2
    if right is None:
        return columns1 * left.numel() + rows1 * columns1 * left.shape[0]
    return columns1 * right.numel() + rows1 * columns1 * len(right) + rows1 * left.numel()


def add_kronecker(
    x: Tensor, base_out: Tensor, w1: Block, w2: Block, scale: float, layer: Layer
) -> Tensor:
    """`base_out` plus scale · (w1 ⊗ w2) applied to x (..., I) or (B, I, *S)."""
    first = w1[0] if w1[1] is None else w1[0] @ w1[1]
    first = scale * first
    return (_add_linear if layer.is_linear else _add_convolution)(x, base_out, first, w2, layer)


def _add_linear(x: Tensor, base_out: Tensor, w1: Tensor, w2: Block, layer: Layer) -> Tensor:
    """x (..., M · N), base_out (..., L · J)."""
    rows1, columns1 = w1.shape
    left, right = w2
    if right is None and rows1 <= columns1:  # w1 first makes less of it
        return AddWhole.apply(x, base_out, w1, left, layer)
    blocks = x.reshape(-1, x.shape[-1] // columns1)  # (T · M, N)
    inner = blocks @ (left if right is None else right).to(x.dtype).t()
    mixed = _mix(w1.to(x.dtype), inner)  # (T · L, J) or (T · L, R)
    if right is None:
        return base_out + mixed.reshape(base_out.shape)
    rows = base_out.reshape(-1, base_out.shape[-1] // rows1)  # (T · L, J)
    return AddProduct.apply(mixed, rows, left).view(base_out.shape)


def _add_convolution(x: Tensor, base_out: Tensor, w1: Tensor, w2: Block, layer: Layer) -> Tensor:
    """x (B, M · N, *S), base_out (B, L · J, *S')."""
    rows1, columns1 = w1.shape
    left, right = w2
    if right is None and rows1 <= columns1:
        return AddWhole.apply(x, base_out, w1, left, layer)
    groups = x.unflatten(1, (columns1, -1)).flatten(0, 1)  # (B · M, N, *S)
    inner = convolution(groups, (left if right is None else right).to(x.dtype), layer)
    mixed = _mix_channels(w1.to(x.dtype), inner.unflatten(0, (-1, columns1)).flatten(1, 2))
    if right is not None:
        mixed = torch.matmul(left.to(x.dtype), mixed.unflatten(1, (rows1, -1)).flatten(3))
    return base_out + mixed.reshape(base_out.shape).to(base_out.dtype)


def _mix(w1: Tensor, blocks: Tensor) -> Tensor:
    """w1 on the groups of rows: (T · M, C) to (T · L, C)."""
    # A small product a position: one product over all would copy blocks twice, to turn them.
    groups = blocks.view(-1, w1.shape[1], blocks.shape[1])  # (T, M, C)
    return torch.bmm(w1.expand(len(groups), -1, -1), groups).flatten(0, 1)


def _mix_channels(w1: Tensor, x: Tensor) -> Tensor:
    """w1 on the groups of channels: (B, M · C, *S) to (B, L · C, *S)."""
    mixed = torch.matmul(w1, _split(x, w1.shape[1]))
    return mixed.view(len(x), -1, *x.shape[2:])


def _split(x: Tensor, groups: int) -> Tensor:
    """(B, M · C, *S) to (B, M, C · S)."""
    return x.unflatten(1, (groups, -1)).flatten(2)


class AddWhole(torch.autograd.Function):
    """out = base_out + (w1 ⊗ w2) x, w1 first, written into base_out's storage.

    Saves x and the blocks; w1 x, as large as x, is computed again in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base_out: Tensor, w1: Tensor, w2: Tensor, layer: Layer
    ) -> Tensor:
        out = base_out.detach().contiguous()
        first, second = w1.to(x.dtype), w2.to(x.dtype)
        if layer.is_linear:
            mixed = _mix(first, x.reshape(-1, w2.shape[1]))
            out.view(-1, len(w2)).addmm_(mixed.to(out.dtype), second.to(out.dtype).t())
        else:
            mixed = _mix_channels(first, x).view(-1, w2.shape[1], *x.shape[2:])
            change = convolution(mixed, second, layer)
            out.add_(change.view(out.shape))
        ctx.save_for_backward(x, w1, w2)
        ctx.layer = layer
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w2 = ctx.saved_tensors
        gradients = _linear_gradients if ctx.layer.is_linear else _convolution_gradients
        narrow, first, second = (tensor.to(x.dtype) for tensor in (grad, w1, w2))
        grad_x, grad_w1, grad_w2 = gradients(x, narrow, first, second, ctx.layer)
        return grad_x.view(x.shape), grad, grad_w1.to(w1.dtype), grad_w2.to(w2.dtype), None


def _linear_gradients(
    x: Tensor, grad: Tensor, w1: Tensor, w2: Tensor, layer: Layer
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, w1 and w2, `grad` being that of the output."""
    blocks = x.reshape(-1, w2.shape[1])  # (T · M, N)
    rows = grad.reshape(-1, len(w2))  # (T · L, J)
    grad_mixed = rows @ w2  # (T · L, N)
    groups, grad_groups = (
        tensor.view(-1, count, w2.shape[1])
        for tensor, count in ((blocks, w1.shape[1]), (grad_mixed, len(w1)))
    )
    grad_w1 = torch.bmm(grad_groups, groups.mT).sum(0)
    # Into a tensor of x's shape, which owns its storage: see AddLinear.
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.bmm(w1.t().expand(len(groups), -1, -1), grad_groups, out=grad_x.view(groups.shape))
    return grad_x, grad_w1, product(rows.t(), _mix(w1, blocks))


def _convolution_gradients(
    x: Tensor, grad: Tensor, w1: Tensor, w2: Tensor, layer: Layer
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for a convolution."""
    mixed = _mix_channels(w1, x)  # (B, L · N, *S)
    images = grad.reshape(-1, len(w2), *grad.shape[2:])  # (B · L, J, *S')
    grad_mixed, grad_w2 = convolution_backward(
        images, mixed.view(-1, w2.shape[1], *x.shape[2:]), w2, layer, True
    )
    assert grad_mixed is not None
    grad_mixed = grad_mixed.reshape(mixed.shape)
    pairs = torch.matmul(_split(grad_mixed, len(w1)), _split(x, w1.shape[1]).mT)  # (B, L, M)
    return _mix_channels(w1.t(), grad_mixed), pairs.sum(0), grad_w2
