"""LoRA on Linear layers and on convolutions (LoCon), with fused autograd functions.

    y = W x + (alpha / rank) · up · down · x

LoRA: https://arxiv.org/abs/2106.09685 (equation 3). LoCon: https://arxiv.org/abs/2309.14859
(section 3.1): `down` is a convolution with the layer's kernel, stride and padding, `up` a 1x1 one.
Both autograd functions save the input and the rank-sized `down · x`, nothing of full width, and
add into the layer's output in place: measured against the usual chain of three operations in
`benchmarks/README.md`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .base import Adapter, Layer


class LoRA(Adapter):
    """ΔW = (alpha / rank) · up @ down, flattened to (O, I · prod(K)).

    Tensors, named as kohya's sd-scripts and LyCORIS do: `lora_up.weight` (O, R) or (O, R, 1...),
    `lora_down.weight` (R, I) or (R, I, *K); with `lora_mid.weight` (R, R, *K) the Tucker form,
    whose down is (R, I, 1...). Files may hold them flattened; here they have the layer's rank.
    """

    name: ClassVar[str] = "lora"
    required: ClassVar[frozenset[str]] = frozenset({"lora_up.weight", "lora_down.weight"})
    optional: ClassVar[frozenset[str]] = frozenset({"lora_mid.weight"})

    def __init__(
        self, up: Tensor, down: Tensor, alpha: float, shape: tuple[int, ...], mid: Tensor | None
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.rank = down.shape[0]
        self.alpha = float(alpha)
        self.up = nn.Parameter(up)
        self.down = nn.Parameter(down)
        self.mid = None if mid is None else nn.Parameter(mid)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @classmethod
    def create(
        cls,
        shape: tuple[int, ...],
        rank: int,
        alpha: float,
        *,
        generator: torch.Generator | None = None,
    ) -> LoRA:
        """down ~ U(±1/√fan_in), which is kaiming_uniform(a=√5), and up = 0: ΔW starts at zero.

        As in microsoft/LoRA loralib/layers.py `reset_parameters`. Raises ValueError for rank < 1.
        """
        if rank < 1:
            raise ValueError(f"rank is {rank}; a LoRA needs at least 1")
        ones = (1,) * (len(shape) - 2)
        down = torch.empty((rank, *shape[1:]), dtype=torch.float32)
        bound = 1.0 / math.sqrt(math.prod(shape[1:]))
        down.uniform_(-bound, bound, generator=generator)
        up = torch.zeros((shape[0], rank, *ones), dtype=torch.float32)
        return cls(up, down, alpha, shape, None)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> LoRA:
        """See `Adapter.from_tensors`. No alpha means alpha = rank (scale 1)."""
        up, down = tensors["lora_up.weight"], tensors["lora_down.weight"]
        mid = tensors.get("lora_mid.weight")
        rank, ones = down.shape[0] if down.ndim else 0, (1,) * (len(shape) - 2)
        kernel = ones if mid is not None else shape[2:]
        wanted = {
            "lora_up.weight": (up, (shape[0], rank, *ones)),
            "lora_down.weight": (down, (rank, shape[1], *kernel)),
        }
        if mid is not None:
            wanted["lora_mid.weight"] = (mid, (rank, rank, *shape[2:]))
        problems = [
            f"{name} is {tuple(tensor.shape)}, expected {expected}"
            for name, (tensor, expected) in wanted.items()
            if not _same_layout(tensor.shape, expected)
        ]
        if rank == 0 and down.ndim:
            problems.append(f"lora_down.weight is {tuple(down.shape)}: a rank of 0")
        alpha = tensors.get("alpha")
        if alpha is not None and alpha.numel() != 1:
            problems.append(f"alpha has {alpha.numel()} values, expected 1")
        if problems:
            raise ValueError("; ".join(problems))
        reshaped = {name: tensor.reshape(expected) for name, (tensor, expected) in wanted.items()}
        return cls(
            reshaped["lora_up.weight"],
            reshaped["lora_down.weight"],
            float(rank if alpha is None else alpha.item()),
            shape,
            reshaped.get("lora_mid.weight"),
        )

    def tensors(self) -> dict[str, Tensor]:
        named = {"lora_up.weight": self.up.detach(), "lora_down.weight": self.down.detach()}
        if self.mid is not None:
            named["lora_mid.weight"] = self.mid.detach()
        return {**named, "alpha": torch.tensor(self.alpha, dtype=torch.float32)}

    def factors(self) -> tuple[Tensor, Tensor]:
        """U = scale · up (O, R) and V = down (R, I · prod(K)), mid folded into V."""
        down: Tensor = self.down
        if self.mid is not None:
            down = torch.einsum("mn...,ni->mi...", self.mid, self.down.flatten(1))
        return self.scale * self.up.flatten(1), down.flatten(1)

    def delta(self, weight: Tensor) -> Tensor:
        up, down = self.factors()
        return (up @ down).reshape(weight.shape)

    def forward(self, x: Tensor, base_out: Tensor, layer: Layer) -> Tensor:
        """x is (..., I) or (B, I, *spatial), base_out the layer's output for it, any float dtype.

        The factors are cast to x's dtype for the products; their gradients come back in float32.
        """
        if len(self.shape) == 2:
            return _AddLinear.apply(x, base_out, self.down, self.up, self.scale)
        if self.mid is None:
            return _AddConv.apply(x, base_out, self.down, self.up, self.scale, layer)
        narrow = _conv(x, self.down.to(x.dtype), None)
        middle = _conv(narrow, self.mid.to(x.dtype), layer)
        return base_out + self.scale * _conv(middle, self.up.to(x.dtype), None)


def _same_layout(found: torch.Size, expected: tuple[int, ...]) -> bool:
    """Equal shapes, or one is the other flattened behind the second axis (files hold both)."""
    if tuple(found) == expected:
        return True
    flat = (expected[0], math.prod(expected[1:]))
    return tuple(found) == flat or (
        tuple(found[:2]) == expected[:2] and math.prod(found[2:]) == math.prod(expected[2:]) == 1
    )


def _conv(x: Tensor, weight: Tensor, layer: Layer | None) -> Tensor:
    """Convolution by `weight` with `layer`'s geometry, or with stride 1 and no padding."""
    axes = weight.ndim - 2
    stride, padding, dilation = _geometry(layer, axes)
    return torch.convolution(x, weight, None, stride, padding, dilation, False, [0] * axes, 1)


def _geometry(layer: Layer | None, axes: int) -> tuple[list[int], list[int], list[int]]:
    if layer is None:
        return [1] * axes, [0] * axes, [1] * axes
    return list(layer.stride), list(layer.padding), list(layer.dilation)


class _AddLinear(torch.autograd.Function):
    """out = base_out + scale · (x @ downᵀ) @ upᵀ, written into base_out's storage.

    The result is a detached alias, so autograd sees a plain output: marking base_out dirty would
    make it rebuild a view (Linear returns one for 3-D input) and copy the gradient three times.
    The version counter is shared, so a base layer that did save its output still raises.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base_out: Tensor, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        hidden = torch.matmul(x, down.t().to(x.dtype))  # (..., R)
        out = base_out.detach().contiguous()
        narrow_up = up.t().to(out.dtype)
        out.view(-1, out.shape[-1]).addmm_(_rows(hidden).to(out.dtype), narrow_up, alpha=scale)
        ctx.save_for_backward(x, hidden, down, up)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, down, up = ctx.saved_tensors
        narrow = grad.to(x.dtype)  # (..., O)
        grad_hidden = _scaled(torch.matmul(narrow, up.to(x.dtype)), ctx.scale)  # (..., R)
        # Not a view of a 2-D product: autograd adds the base layer's gradient into it in place
        # only if it owns its storage.
        grad_x = torch.matmul(grad_hidden, down.to(x.dtype)) if ctx.needs_input_grad[0] else None
        grad_down = (_rows(grad_hidden).t() @ _rows(x)).to(down.dtype)
        # Transposed: with the long side in front this product runs at half the speed.
        grad_up = _scaled(_rows(hidden).t() @ _rows(narrow), ctx.scale).t().to(up.dtype)
        return grad_x, grad, grad_down, grad_up, None


class _AddConv(torch.autograd.Function):
    """out = base_out + scale · up ∗ (down ∗ x), up 1x1, written into base_out's storage."""

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
        if _is_pointwise(layer):
            narrow_down = down.flatten(1).to(x.dtype).expand(x.shape[0], -1, -1)
            hidden = torch.bmm(narrow_down, x.flatten(2)).unflatten(2, x.shape[2:])  # (B, R, *S)
        else:
            hidden = _conv(x, down.to(x.dtype), layer)
        out = base_out.detach()
        narrow_up = up.flatten(1).to(out.dtype)  # (O, R)
        if out.is_contiguous():
            batch_up = narrow_up.expand(out.shape[0], -1, -1)
            out.view(out.shape[0], out.shape[1], -1).baddbmm_(
                batch_up, hidden.reshape(*hidden.shape[:2], -1).to(out.dtype), alpha=scale
            )
        else:
            out.add_(_conv(hidden, up.to(x.dtype), None), alpha=scale)
        ctx.save_for_backward(x, hidden, down, up)
        ctx.scale, ctx.layer = scale, layer
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, down, up = ctx.saved_tensors
        batch, spatial = x.shape[0], hidden.shape[2:]
        grad_flat = grad.flatten(2).to(x.dtype)  # (B, O, S)
        narrow_up = up.flatten(1).t().to(x.dtype).expand(batch, -1, -1)  # (B, R, O)
        grad_hidden = _scaled(torch.bmm(narrow_up, grad_flat), ctx.scale)  # (B, R, S)
        grad_up = torch.bmm(hidden.flatten(2), grad_flat.transpose(1, 2)).sum(0)  # (R, O)
        grad_up = _scaled(grad_up, ctx.scale).t().reshape(up.shape).to(up.dtype)
        if _is_pointwise(ctx.layer):
            grad_x, grad_down = _pointwise_backward(grad_hidden, x, down, ctx.needs_input_grad[0])
        else:
            stride, padding, dilation = _geometry(ctx.layer, down.ndim - 2)
            grad_x, grad_down, _ = torch.ops.aten.convolution_backward(
                grad_hidden.unflatten(2, spatial),
                x,
                down.to(x.dtype),
                None,
                stride,
                padding,
                dilation,
                False,
                [0] * len(stride),
                1,
                [ctx.needs_input_grad[0], True, False],
            )
        return grad_x, grad, grad_down.to(down.dtype), grad_up, None, None


def _pointwise_backward(
    grad_hidden: Tensor, x: Tensor, down: Tensor, wanted: bool
) -> tuple[Tensor | None, Tensor]:
    """Gradients of a 1x1 convolution as batched products: much quicker than the general kernel.

    grad_hidden (B, R, S), x (B, I, *S), down (R, I, 1...); the gradients of x, if `wanted`, and
    of down.
    """
    grad_x = None
    if wanted:
        narrow_down = down.flatten(1).t().to(x.dtype).expand(x.shape[0], -1, -1)
        # Into a tensor of x's shape, which owns its storage: see _AddLinear.
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        torch.bmm(narrow_down, grad_hidden, out=grad_x.flatten(2))
    grad_down = torch.bmm(grad_hidden, x.flatten(2).transpose(1, 2)).sum(0)
    return grad_x, grad_down.reshape(down.shape)


def _is_pointwise(layer: Layer) -> bool:
    """Whether a convolution is a product of matrices: kernel and stride 1, no padding."""
    kernel = layer.shape[2:]
    return all(size == 1 for size in (*kernel, *layer.stride)) and not any(layer.padding)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1.0 else tensor.mul_(scale)
