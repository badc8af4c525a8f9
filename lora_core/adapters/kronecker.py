"""Apply a Kronecker product to a layer's input without building it: the vec trick.

    (w1 ⊗ w2) x = w1 · X · w2ᵀ,   X being x as a matrix (M, N) at each position

A convolution does the same with w2 ∗ on each of the M groups of channels. Letters as in lokr.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layer import Layer
from .low_rank import AddProduct
from .narrow_conv import convolution

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
    blocks = x.reshape(-1, x.shape[-1] // columns1)  # (T · M, N)
    inner = left if right is None else right
    if right is None and rows1 < columns1:  # w1 first makes less of it
        mixed = _mix(w1.to(x.dtype), blocks)  # (T · L, N)
        out = AddProduct.apply(mixed, _blocks(base_out, rows1), left)
    elif right is None:
        mixed = _mix(w1.to(x.dtype), blocks @ inner.to(x.dtype).t())  # (T · L, J)
        return base_out + mixed.reshape(base_out.shape)
    else:
        mixed = _mix(w1.to(x.dtype), blocks @ inner.to(x.dtype).t())  # (T · L, R)
        out = AddProduct.apply(mixed, _blocks(base_out, rows1), left)
    return out.view(base_out.shape)


def _blocks(base_out: Tensor, rows1: int) -> Tensor:
    """(..., L · J) as (T · L, J)."""
    return base_out.reshape(-1, base_out.shape[-1] // rows1)


def _mix(w1: Tensor, blocks: Tensor) -> Tensor:
    """w1 on the groups of rows: (T · M, C) to (T · L, C), by one product over all positions."""
    groups = blocks.unflatten(0, (-1, w1.shape[1])).transpose(0, 1)  # (M, T, C)
    mixed = w1 @ groups.flatten(1)  # (L, T · C)
    return mixed.unflatten(1, groups.shape[1:]).transpose(0, 1).flatten(0, 1)


def _add_convolution(x: Tensor, base_out: Tensor, w1: Tensor, w2: Block, layer: Layer) -> Tensor:
    """x (B, M · N, *S), base_out (B, L · J, *S')."""
    rows1, columns1 = w1.shape
    left, right = w2
    groups = x.unflatten(1, (columns1, -1)).flatten(0, 1)  # (B · M, N, *S)
    inner = convolution(groups, (left if right is None else right).to(x.dtype), layer)
    mixed = torch.matmul(w1.to(x.dtype), inner.unflatten(0, (-1, columns1)).flatten(2))
    mixed = mixed.unflatten(2, inner.shape[1:])  # (B, L, R, *S')
    if right is not None:
        outer = torch.matmul(left.to(x.dtype), mixed.flatten(3))  # (B, L, J, S')
        mixed = outer.unflatten(3, mixed.shape[3:])
    return base_out + mixed.reshape(base_out.shape).to(base_out.dtype)
