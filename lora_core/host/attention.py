"""An attention with a backward, whatever the user samples with.

On a CPU in bf16 or fp16, torch's own takes twice as long as plain products where the keys are few,
as in cross attention and in the deep blocks of a UNet: see `benchmarks/README.md`. The products
keep their weights (B·H, Q, K) for the backward pass, so long sequences stay with torch.
"""

from __future__ import annotations

from typing import Any

import torch
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_WEIGHTS = 2**22  # B·H·Q·K; with more, torch's own attention is as quick


def differentiable_attention(func: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Stands in for `func`, the attention that the user runs: sage and others have no backward."""
    products = _by_products(*args, **kwargs)
    return attention_pytorch(*args, **kwargs) if products is None else products


def _by_products(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: Any = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    **options: Any,
) -> Tensor | None:
    """The host's attention of q (B, Q, H·D) or, to `skip_reshape`, (B, H, Q, D), k and v alike.

    None where torch's own is to be taken.
    """
    is_half = q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16)
    if not is_half or mask is not None or enable_gqa:
        return None
    if not skip_reshape:  # SD3 gives k and v as (B, K, H, D)
        by_head = (len(q), -1, heads, q.shape[-1] // heads)
        q, k, v = (part.reshape(by_head).transpose(1, 2) for part in (q, k, v))
    if q.shape[:3].numel() * k.shape[2] > MAX_WEIGHTS:
        return None
    rows = [part.flatten(0, 1) for part in (q, k, v)]  # (B·H, T, D)
    out = _Attention.apply(*rows, q.shape[-1] ** -0.5 if scale is None else scale)
    out = out.unflatten(0, q.shape[:2])
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


class _Attention(torch.autograd.Function):
    """softmax(scale · q kᵀ) v, q (N, Q, D), k and v (N, K, D); the softmax in float32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        scores = torch.bmm(q.float(), (scale * k.float()).transpose(1, 2))
        weights = scores.softmax(-1).to(q.dtype)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale = scale
        return torch.bmm(weights, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        grad_v = torch.bmm(weights.transpose(1, 2), grad)
        grad_weights = torch.bmm(grad, v.transpose(1, 2))
        grad_scores = torch.ops.aten._softmax_backward_data(
            grad_weights, weights, -1, weights.dtype
        ).mul_(ctx.scale)
        return torch.bmm(grad_scores, k), torch.bmm(grad_scores.transpose(1, 2), q), grad_v, None
