"""Add an adapter's change to a layer's output by the cheaper of its factors and its dense ΔW."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import narrow_conv
from .layer import Layer
from .low_rank import add_low_rank, as_rows

if TYPE_CHECKING:
    from .base import Adapter


def add_change(adapter: Adapter, x: Tensor, base_out: Tensor, layer: Layer) -> Tensor:
    """`base_out` plus ΔW applied to `x`; may write into `base_out`.

    Low-rank where `factors_are_cheaper`, else through `AddDense`.
    """
    rank = adapter.factored_rank
    if rank is None or not factors_are_cheaper(rank, adapter.rank, layer, base_out):
        return add_dense(adapter, x, base_out, layer)
    factors = adapter.factors()
    assert factors is not None, f"{adapter.name} has a factored rank and no factors"
    up, down = factors
    return add_low_rank(x, base_out, down, up, 1.0, layer)


def factors_are_cheaper(rank: int, built_from: int, layer: Layer, base_out: Tensor) -> bool:
    """Whether factors of `rank` take fewer multiplications than a dense ΔW.

    For T positions they take T · rank · (O + I·K), in each of forward, gradient of x and of the
    factors. The dense one takes T · O · I·K, and is built of factors of the rank `built_from`.
    """
    positions = base_out.numel() // layer.shape[0]
    area = layer.shape[0] * layer.fan_in
    return positions * rank * (layer.shape[0] + layer.fan_in) < (positions + built_from) * area


def add_dense(adapter: Adapter, x: Tensor, base_out: Tensor, layer: Layer) -> Tensor:
    """`base_out` plus ΔW applied to `x`, ΔW built once a step."""
    return AddDense.apply(x, base_out, adapter, layer, *adapter.parameters())


class AddDense(torch.autograd.Function):
    """out = base_out + ΔW ∗ x for any adapter, written into base_out's storage.

    Saves x and the parameters. ΔW is kept by the adapter until the backward pass has used it, so
    a block that is computed again there does not build it again. The parameters' gradients come
    from that of ΔW through `adapter.delta`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base_out: Tensor, adapter: Adapter, layer: Layer, *parameters: Tensor
    ) -> Tensor:
        change = adapter.dense(layer, x.dtype)
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
        x, *parameters = ctx.saved_tensors
        adapter, layer = ctx.adapter, ctx.layer
        narrow = grad.to(x.dtype)
        change = adapter.dense(layer, x.dtype)
        if layer.is_linear:
            grad_x = (as_rows(narrow) @ change).view(x.shape) if ctx.needs_input_grad[0] else None
            grad_change = as_rows(narrow).t() @ as_rows(x)
        else:
            grad_x, grad_change = narrow_conv.convolution_backward(
                narrow, x, change, layer, ctx.needs_input_grad[0]
            )
        weight = adapter.weight_of(layer)
        with torch.enable_grad():
            leaves = list(adapter.parameters())
            delta = adapter.delta(weight)
        grads = torch.autograd.grad(delta, leaves, grad_change.to(delta.dtype), allow_unused=True)
        adapter.forget_dense()  # a fused optimizer changes parameters, but not their versions
        return grad_x, grad, None, None, *grads
