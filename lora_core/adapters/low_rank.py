"""Add `scale · up · down · x` to a layer's output: autograd functions for Linear and ConvNd.

Both save the input and the rank-sized `down · x`, nothing of full width, and write into the
layer's output in place: measured in `benchmarks/README.md`. The factors are cast to the input's
dtype for the products; their gradients come back in the factors' own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import narrow_conv
from .layer import Layer


def add_low_rank(
    x: Tensor, base_out: Tensor, down: Tensor, up: Tensor, scale: float, layer: Layer
) -> Tensor:
    """`base_out` plus scale · up · down · x; down (R, I·K) and up (O, R), flattened or not."""
    if layer.is_linear:
        return AddLinear.apply(x, base_out, down, up, scale)
    kernel, ones = layer.shape[1:], (1,) * (len(layer.shape) - 2)
    down, up = down.view(-1, *kernel), up.view(layer.shape[0], -1, *ones)
    return AddConv.apply(x, base_out, down, up, scale, layer)


class AddLinear(torch.autograd.Function):
    """out = base_out + scale · (x @ downᵀ) @ upᵀ, written into base_out's storage.

    x (..., I), base_out (..., O), down (R, I), up (O, R). The result is a detached alias, so
    autograd sees a plain output: marking base_out dirty would make it rebuild a view (Linear
    returns one for 3-D input) and copy the gradient three times. The version counter is shared,
    so a base layer that did save its output still raises.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base_out: Tensor, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        hidden = torch.mm(as_rows(x), down.to(x.dtype).t())  # (N, R)
        out = base_out.detach().contiguous()
        as_rows(out).addmm_(hidden.to(out.dtype), up.to(out.dtype).t(), alpha=scale)
        ctx.save_for_backward(x, hidden, down, up)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, down, up = ctx.saved_tensors
        rows, narrow = as_rows(x), as_rows(grad).to(x.dtype)  # (N, I), (N, O)
        grad_hidden = _scaled(torch.mm(narrow, up.to(x.dtype)), ctx.scale)  # (N, R)
        grad_x = None
        if ctx.needs_input_grad[0]:
            # Into a tensor of x's shape, not a view of a 2-D product: autograd adds the base
            # layer's gradient into it in place only if it owns its storage.
            grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            torch.mm(grad_hidden, down.to(x.dtype), out=as_rows(grad_x))
        grad_down = _in_rows(narrow_conv.product(grad_hidden.t(), rows), down.dtype)
        grad_up = _scaled(narrow_conv.product(hidden.t(), narrow), ctx.scale).t()
        return grad_x, grad, grad_down, _in_rows(grad_up, up.dtype), None


class AddProduct(torch.autograd.Function):
    """out = base_out + x @ weightᵀ, written into base_out's storage; x (T, I), weight (O, I)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base_out: Tensor, weight: Tensor) -> Tensor:
        out = base_out.detach().contiguous()
        out.addmm_(x.to(out.dtype), weight.to(out.dtype).t())
        ctx.save_for_backward(x, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        narrow = grad.to(x.dtype)
        grad_x = narrow @ weight.to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = _in_rows(narrow_conv.product(narrow.t(), x), weight.dtype)
        return grad_x, grad, grad_weight


class AddConv(torch.autograd.Function):
    """out = base_out + scale · up ∗ (down ∗ x), up 1x1, written into base_out's storage.

    x (B, I, *S), base_out (B, O, *S'), down (R, I, *K) with the layer's stride and padding,
    up (O, R, 1...).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base_out: Tensor,
        down: Tensor,
        up: Tensor,
        scale: float,
        layer: Layer,
    ) -> Tensor:
        hidden = narrow_conv.forward(x, down, layer)  # (B, R, *S')
        out = base_out.detach().contiguous()
        batch_up = up.flatten(1).to(out.dtype).expand(out.shape[0], -1, -1)
        out.flatten(2).baddbmm_(batch_up, hidden.flatten(2).to(out.dtype), alpha=scale)
        ctx.save_for_backward(x, hidden, down, up)
        ctx.scale, ctx.layer = scale, layer
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, down, up = ctx.saved_tensors
        flat = grad.flatten(2).to(x.dtype)  # (B, O, N)
        batch_up = up.flatten(1).to(x.dtype).t().expand(x.shape[0], -1, -1)  # (B, R, O)
        grad_hidden = _scaled(torch.bmm(batch_up, flat), ctx.scale).view_as(hidden)
        grad_up = _scaled(narrow_conv.columns_product(hidden.flatten(2), flat), ctx.scale)
        grad_x, grad_down = narrow_conv.backward(
            grad_hidden, x, down, ctx.layer, wants_x=ctx.needs_input_grad[0]
        )
        grad_up = _in_rows(grad_up.t(), up.dtype).view(up.shape)
        return grad_x, grad, _in_rows(grad_down, down.dtype), grad_up, None, None


def as_rows(tensor: Tensor) -> Tensor:
    """(..., N) as (T, N)."""
    return tensor.reshape(-1, tensor.shape[-1])


def _in_rows(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """`grad` contiguous and in `dtype`, by one copy at most, so that autograd makes no other."""
    return grad.to(dtype, memory_format=torch.contiguous_format).contiguous()


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1.0 else tensor.mul_(scale)
