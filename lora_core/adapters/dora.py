"""DoRA: a change whose direction and magnitude are trained apart.

    W' = m · (W + ΔV) / ‖W + ΔV‖        ΔW = W' - W

https://arxiv.org/abs/2402.09353 (equation 5), ΔV being the change of a LoRA, LoHa or LoKr and m
the magnitude of each row (out axis) or column (in axis) of the weight. The norm is that of W + ΔV
and takes part in the gradient. Letters as in base.py.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .add_change import add_dense, factors_are_cheaper
from .base import Adapter, Axes, Built
from .layer import Layer
from .low_rank import add_low_rank
from .narrow_conv import product

NAME = "dora_scale"


class Decomposable(Adapter):
    """A type with a change ΔV of its own, which may be decomposed as in DoRA.

    `magnitude` is m, (O, 1, ...) or (1, I, 1, ...), in files `dora_scale`; None leaves ΔW = ΔV.
    """

    magnitude: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("magnitude", None)

    @abc.abstractmethod
    def change(self) -> Tensor:
        """ΔV in the weight's shape, alpha / rank included."""

    @abc.abstractmethod
    def change_gradients(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The parameters' gradients, in their order, `grad` being that of ΔV; builds no ΔV."""

    def change_factors(self) -> tuple[Tensor, Tensor] | None:
        """(U, V) with ΔV.flatten(1) = U @ V exactly, or None."""
        return None

    @property
    def change_rank(self) -> int | None:
        """The number of columns of U, without computing it."""
        return None

    def is_factored(self, layer: Layer, base_out: Tensor) -> bool:
        """Whether `add` is cheaper than a dense ΔW."""
        rank = self.change_rank
        return rank is not None and factors_are_cheaper(rank, self.rank, layer, base_out)

    def add(self, x: Tensor, base_out: Tensor, layer: Layer) -> Tensor:
        """`base_out` plus ΔV applied to `x`, without a dense ΔV. May write into `base_out`."""
        factors = self.change_factors()
        assert factors is not None
        up, down = factors
        return add_low_rank(x, base_out, down, up, 1.0, layer)

    def decompose(self, weight: Tensor) -> None:
        """Begin to train the magnitude of each row of W, which starts as the row's norm."""
        first = next(self.parameters())
        norm = norm_of(weight.detach().to(first.device, torch.float32), axis=0)
        self.magnitude = nn.Parameter(norm)

    @torch.no_grad()
    def limit_norm(self, longest: float) -> None:
        """Scale ΔV down to a Frobenius norm of at most `longest`, on the device.

        Of the factors it is tr((Uᵀ U) (V Vᵀ)). As `scale_weight_norms` of kohya's sd-scripts
        (networks/lora.py `apply_max_norm_regularization`), but exact for every type.
        """
        factors = self.change_factors() if self.change_rank is not None else None
        if factors is None:
            square = self.change().square().sum()
        else:
            up, down = factors
            square = ((up.t() @ up) * (down @ down.t())).sum()
        ratio = (longest / square.clamp(min=1e-30).sqrt()).clamp(max=1.0)
        for factor in self.last_factors():
            factor.mul_(ratio)

    def take_magnitude(self, tensors: Mapping[str, Tensor]) -> None:
        """Bring in the `dora_scale` of a file, if it has one. Raises ValueError for its shape."""
        scale = tensors.get(NAME)
        if scale is None:
            return
        ones = (1,) * (len(self.shape) - 2)
        out, into = (self.shape[0], 1, *ones), (1, self.shape[1], *ones)
        if tuple(scale.shape) in (out, (self.shape[0],), (self.shape[0], 1)):
            self.magnitude = nn.Parameter(scale.reshape(out))
        elif tuple(scale.shape) in (into, (1, self.shape[1])):
            self.magnitude = nn.Parameter(scale.reshape(into))
        else:
            raise ValueError(f"{NAME} is {tuple(scale.shape)}, expected {out} or {into}")

    def with_magnitude(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The named tensors of a file, with `dora_scale` where there is one."""
        return tensors if self.magnitude is None else {**tensors, NAME: self.magnitude.detach()}

    def magnitude_axes(self, axes: Axes) -> Axes | None:
        """`row_axes` with the magnitude's; None where it is of the columns, so of all rows."""
        if self.magnitude is None:
            return axes
        return {**axes, NAME: (0, 1)} if self._axis == 0 else None

    @property
    def needs_all_rows(self) -> bool:
        return self.magnitude is not None

    @property
    def needs_weight(self) -> bool:
        return self.magnitude is not None

    def factors(self) -> tuple[Tensor, Tensor] | None:
        return self.change_factors() if self.magnitude is None else None

    @property
    def factored_rank(self) -> int | None:
        return self.change_rank if self.magnitude is None else None

    def delta(self, weight: Tensor) -> Tensor:
        return self.built(weight).change

    def built(self, weight: Tensor) -> Built:
        change = self.change()
        if self.magnitude is None:
            return Built(change)
        changed = weight + change
        norm = norm_of(changed, self._axis)
        return Built(self.magnitude * changed / norm - weight, norm)

    def delta_gradients(
        self, weight: Tensor, grad: Tensor, built: Built
    ) -> tuple[Tensor | None, ...]:
        """Of the direction u = (W + ΔV) / ‖W + ΔV‖, which is (W + ΔW) / m, without ΔV:

            ∂m = Σ G ∘ u        ∂ΔV = (m / ‖W + ΔV‖) ∘ (G - ∂m ∘ u)

        Where m is 0 nothing tells u; such a row, of a weight of zeros, has no direction either.
        """
        if self.magnitude is None:
            return self.change_gradients(grad)
        assert built.norm is not None
        with torch.no_grad():
            magnitude = self.magnitude.detach()
            direction = torch.where(magnitude == 0, 0.0, (weight + built.change) / magnitude)
            others = [dim for dim in range(grad.ndim) if dim != self._axis]
            share = (grad * direction).sum(others, keepdim=True)
            inner = (grad - share * direction) * (magnitude / built.norm)
        grads = self.change_gradients(inner)
        names = [name for name, _ in self.named_parameters()]
        return tuple(
            share if name == "magnitude" else grad for name, grad in zip(names, grads, strict=True)
        )

    def forward(self, x: Tensor, base_out: Tensor, layer: Layer) -> Tensor:
        """Out axis: (m / ‖W + ΔV‖) ∘ (W x + ΔV x) + bias, so that nothing dense multiplies x."""
        in_axis = self.magnitude is not None and self._axis == 1
        if in_axis or not self.is_factored(layer, base_out):
            return add_dense(self, x, base_out, layer)
        out = self.add(x, base_out, layer)
        if self.magnitude is None:
            return out
        gain = self.magnitude.flatten() / self._norm(layer)
        return ScaleOutput.apply(out, gain, layer.bias(), layer.is_linear)

    @property
    def _axis(self) -> int:
        assert self.magnitude is not None
        return 0 if self.magnitude.shape[0] == self.shape[0] and self.magnitude.shape[1] == 1 else 1

    def _norm(self, layer: Layer) -> Tensor:
        """‖W + ΔV‖ of each row (O,), by the factors where that is cheaper than a dense ΔV."""
        factors = self.change_factors() if (self.change_rank or 256) < 256 else None
        if factors is None:
            return norm_of(self.weight_of(layer) + self.change(), axis=0).flatten()
        return RowNorm.apply(*factors, partial(self.weight_of, layer))


def norm_of(weight: Tensor, axis: int) -> Tensor:
    """The Euclidean norm over all axes but `axis`, which are kept as 1; never zero."""
    others = [dim for dim in range(weight.ndim) if dim != axis]
    norm = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    return norm.clamp(min=torch.finfo(norm.dtype).tiny)


class RowNorm(torch.autograd.Function):
    """‖W + UV‖ of each row (O,), never zero; U (O, R), V (R, I·K), `weight()` gives W.

        ‖W + UV‖² = ‖W‖² + Σ_r (2 W Vᵀ + U V Vᵀ) ∘ U

    Nothing of W's size is made or saved; in the backward pass W is asked for again.
    """

    @staticmethod
    def forward(ctx: Any, up: Tensor, down: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        flat = weight().flatten(1)
        crossed = flat @ down.t()  # (O, R)
        half = torch.addmm(crossed, up, down @ down.t())  # (W + UV) Vᵀ
        square = torch.linalg.vector_norm(flat, dim=1).square_()
        square += (crossed.add_(half) * up).sum(1)
        norm = square.clamp_(min=torch.finfo(square.dtype).tiny).sqrt_()
        ctx.save_for_backward(up, down, half, norm)
        ctx.weight = weight
        return norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        up, down, half, norm = ctx.saved_tensors
        share = (grad / norm)[:, None]
        turned = (share * up).t()  # (R, O)
        grad_down = product(turned, ctx.weight().flatten(1)).addmm_(turned @ up, down)
        return share * half, grad_down, None


class ScaleOutput(torch.autograd.Function):
    """gain ∘ (out - bias) + bias, gain and bias (O,), out (..., O) or (B, O, *S).

    In the gain's dtype and rounded once: a gain is close to 1, where bf16 has steps of 0.8 %.
    """

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, gain: Tensor, bias: Tensor | None, is_linear: bool
    ) -> Tensor:
        ctx.save_for_backward(out, gain, bias)
        ctx.view = (-1,) if is_linear else (-1, *[1] * (out.ndim - 2))
        wide = gain.view(ctx.view)
        if bias is None:
            return (out * wide).to(out.dtype)
        offset = ((1.0 - gain) * bias.to(gain.dtype)).view(ctx.view)
        return torch.addcmul(offset, out.to(gain.dtype), wide).to(out.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, gain, bias = ctx.saved_tensors
        axes = [axis for axis in range(out.ndim) if axis != out.ndim - len(ctx.view)]
        wide = grad * out
        grad_gain = wide.sum(axes, dtype=gain.dtype)
        if bias is not None:
            grad_gain -= bias.to(gain.dtype) * grad.sum(axes, dtype=gain.dtype)
        # In the same memory: a second tensor of this size costs more than the product.
        return torch.mul(grad, gain.view(ctx.view), out=wide), grad_gain, None, None
