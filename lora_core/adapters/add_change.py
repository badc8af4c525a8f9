"""Add an adapter's dense ΔW to a layer's output, and when that is cheaper than its factors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import narrow_conv
from .layer import Layer
from .low_rank import as_rows

if TYPE_CHECKING:
    from .base import Adapter


def is_cheaper(per_position: int, to_build: int, layer: Layer, base_out: Tensor) -> bool:
    """Whether `per_position` multiplications take fewer than a dense ΔW, built by `to_build`.

    For T positions the dense one takes T · O · I·K. Both are counted for the forward pass; the
    gradients take the same again on either side.
    """
    positions = base_out.numel() // layer.shape[0]
    return positions * per_position < positions * layer.shape[0] * layer.fan_in + to_build


def factors_are_cheaper(rank: int, built_from: int, layer: Layer, base_out: Tensor) -> bool:
    """Whether factors of `rank` are cheaper than a dense ΔW.

    A position takes rank · (O + I·K) of them, ΔW is built of factors of the rank `built_from`.
    """
    to_build = built_from * layer.shape[0] * layer.fan_in
    return is_cheaper(rank * (layer.shape[0] + layer.fan_in), to_build, layer, base_out)


def factors_are_smaller(rank: int, shape: tuple[int, ...]) -> bool:
    """Whether factors of `rank` hold fewer numbers than a dense ΔW of `shape`."""
    rows, columns = shape[0], math.prod(shape[1:])
    return rank * (rows + columns) < rows * columns


def add_dense(adapter: Adapter, x: Tensor, base_out: Tensor, layer: Layer) -> Tensor:
    """`base_out` plus ΔW applied to `x`; may write into `base_out`."""
    return AddDense.apply(x, base_out, adapter, layer, *adapter.parameters())


class AddDense(torch.autograd.Function):
    """out = base_out + ΔW ∗ x for any adapter, written into base_out's storage.

    Saves x, and the parameters so that a change of one in between raises. ΔW is kept by the
    adapter until the backward pass has used it, so a block that is computed again there does not
    build it again. The parameters' gradients come from that of ΔW: see `delta_gradients`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base_out: Tensor, adapter: Adapter, layer: Layer, *parameters: Tensor
    ) -> Tensor:
        change = adapter.dense(layer, x.dtype).change
        out = base_out.detach().contiguous()
        if layer.is_linear:
            as_rows(out).addmm_(as_rows(x).to(out.dtype), change.to(out.dtype).t())
        else:
            out.add_(narrow_conv.convolution(x, change, layer))
        ctx.save_for_backward(x, *parameters)
        ctx.adapter, ctx.layer = adapter, layer
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x = ctx.saved_tensors[0]
        adapter, layer = ctx.adapter, ctx.layer
        narrow = grad.to(x.dtype)
        built = adapter.dense(layer, x.dtype)
        change = built.change
        if layer.is_linear:
            grad_x = (as_rows(narrow) @ change).view(x.shape) if ctx.needs_input_grad[0] else None
            grad_change = as_rows(narrow).t() @ as_rows(x)
        else:
            grad_x, grad_change = narrow_conv.convolution_backward(
                narrow, x, change, layer, ctx.needs_input_grad[0]
            )
        adapter.forget_dense()  # a fused optimizer changes parameters, but not their versions
        weight = adapter.weight_of(layer)
        grads = adapter.delta_gradients(weight, grad_change.to(weight.dtype), built)
        return grad_x, grad, None, None, *grads
