"""GLoRA: a low-rank change of the layer's input and one of the layer itself.

    ΔW = (alpha / rank) · (W a1 a2 + b1 b2)

https://arxiv.org/abs/2306.07967 (equation 10, of which LyCORIS' glora.py keeps the terms A and B).
Letters as in base.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .add_change import is_cheaper
from .base import Adapter, Axes, Built
from .create_options import DEFAULT, CreateOptions
from .fitting import Shape, alpha_of, first_size, fitted
from .layer import Layer
from .lora import uniform
from .low_rank import add_low_rank
from .narrow_conv import convolution

NAMES = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")


class GLoRA(Adapter):
    """Tensors as LyCORIS writes them: `a1.weight` (I, R, 1...), `a2.weight` (R, I, 1...),
    `b1.weight` (O, R, 1...), `b2.weight` (R, I, *K). a1 and a2 act on the channels of W alone.

    Old files have the two of a pair under each other's name: a1 (R, I), a2 (I, R), b1 (R, I) and
    b2 (O, R). They are read where their shapes tell, and written in the new order.
    """

    name: ClassVar[str] = "glora"
    help: ClassVar[str] = "two low-rank pairs, one of which starts from the model's own weight."
    forms: ClassVar = (frozenset(NAMES),)

    def __init__(self, parts: Mapping[str, Tensor], alpha: float, shape: Shape) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.rank = parts["a2.weight"].shape[0]
        self.alpha = float(alpha)
        self.a1, self.a2, self.b1, self.b2 = (nn.Parameter(parts[name]) for name in NAMES)
        self._product: tuple[object, Tensor] | None = None  # W a1, and of which numbers

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @classmethod
    def create(
        cls,
        shape: Shape,
        rank: int,
        alpha: float,
        *,
        options: CreateOptions = DEFAULT,
        generator: torch.Generator | None = None,
    ) -> GLoRA:
        """a1 and b1 ~ U(±1/√R), which is kaiming_uniform(a=√5), a2 and b2 = 0: ΔW is zero.

        As in LyCORIS glora.py. Raises ValueError for rank < 1.
        """
        if rank < 1:
            raise ValueError(f"rank is {rank}; a GLoRA needs at least 1")
        random = ("a1.weight", "b1.weight")
        parts = {
            name: uniform(size, generator) if name in random else torch.zeros(size)
            for name, size in _sizes(shape, rank).items()
        }
        return cls(parts, alpha, shape)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: Shape) -> GLoRA:
        """See `Adapter.from_tensors`."""
        if is_old(tensors, shape):
            new = dict(
                zip(NAMES, ("a2.weight", "a1.weight", "b2.weight", "b1.weight"), strict=True)
            )
            tensors = {new.get(name, name): tensor for name, tensor in tensors.items()}
        missing = [name for name in NAMES if name not in tensors]
        if missing:
            raise ValueError(f"{', '.join(missing)} is missing")
        rank = first_size(tensors, "a2.weight")
        problems = [] if rank else ["a2.weight has a rank of 0"]
        parts = fitted(tensors, _sizes(shape, rank), problems)
        return cls(parts, alpha_of(tensors, rank), shape)

    def tensors(self) -> dict[str, Tensor]:
        parts = (self.a1, self.a2, self.b1, self.b2)
        named = {name: part.detach() for name, part in zip(NAMES, parts, strict=True)}
        return {**named, "alpha": torch.tensor(self.alpha, dtype=torch.float32)}

    def row_axes(self) -> Axes:
        return {"b1.weight": (0, 1)}

    @property
    def needs_all_rows(self) -> bool:
        return True

    @property
    def needs_weight(self) -> bool:
        return True

    def delta(self, weight: Tensor) -> Tensor:
        product = _times(weight, self.a1.flatten(1))
        change = _times(product, self.a2.flatten(1))
        return self.scale * (change + (self.b1.flatten(1) @ self.b2.flatten(1)).view_as(change))

    @torch.no_grad()
    def delta_gradients(
        self, weight: Tensor, grad: Tensor, built: Built
    ) -> tuple[Tensor | None, ...]:
        """Of the pairs (W a1, a2) and (b1, b2), each by its own product with G; of a1 by Wᵀ."""
        a1, a2, b1, b2 = (parameter.flatten(1) for parameter in self.parameters())
        flat, grad_product = grad.flatten(1), _times(grad, a2.t())  # the latter is W a1's
        grads = (
            _crossed(weight, grad_product),
            _crossed(_times(weight, a1), grad),
            flat @ b2.t(),
            b1.t() @ flat,
        )
        pairs = zip(grads, self.parameters(), strict=True)
        return tuple((self.scale * found).view_as(parameter) for found, parameter in pairs)

    def is_factored(self, layer: Layer, base_out: Tensor) -> bool:
        """Whether `add` takes fewer multiplications than a dense ΔW. Both need W a1."""
        out, into, taps = layer.shape[0], layer.shape[1], math.prod(layer.shape[2:])
        per_position = self.rank * (out + into * taps + into + out * taps)  # b1, b2, a2, W a1
        to_build = 2 * self.rank * out * layer.fan_in
        return is_cheaper(per_position, to_build, layer, base_out)

    def add(self, x: Tensor, base_out: Tensor, layer: Layer) -> Tensor:
        """The factors [W a1 | b1] and [a2; b2], of rank 2R, where the kernel has a single tap.

        Else a2 is a 1x1 convolution to R channels and W a1 one from there to the outputs.
        """
        product = self.scale * WeightProduct.apply(self.a1, self, layer)  # (O, R, *K)
        if math.prod(self.shape[2:]) == 1:
            up = torch.cat([product.flatten(1), self.scale * self.b1.flatten(1)], dim=1)
            down = torch.cat([self.a2.flatten(1), self.b2.flatten(1)])
            return add_low_rank(x, base_out, down, up, 1.0, layer)
        out = add_low_rank(x, base_out, self.b2, self.b1, self.scale, layer)
        narrow = convolution(x, self.a2.to(x.dtype), None)
        return out + convolution(narrow, product.to(x.dtype), layer).to(out.dtype)

    @torch.no_grad()
    def weight_product(self, layer: Layer) -> Tensor:
        """W a1 (O, R, *K), kept as `dense` keeps ΔW."""
        state = (layer, self.a1.data_ptr(), self.a1._version)
        if self._product is None or self._product[0] != state:
            self._product = (state, _times(self.weight_of(layer), self.a1.flatten(1)))
        return self._product[1]

    def forget_dense(self) -> None:
        super().forget_dense()
        self._product = None


class WeightProduct(torch.autograd.Function):
    """W a1 for the a1 of an adapter, W being taken anew from the layer in the backward pass."""

    @staticmethod
    def forward(ctx: Any, a1: Tensor, adapter: GLoRA, layer: Layer) -> Tensor:
        ctx.adapter, ctx.layer, ctx.shape = adapter, layer, a1.shape
        return adapter.weight_product(layer).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight = ctx.adapter.weight_of(ctx.layer)
        ctx.adapter.forget_dense()
        return _crossed(weight, grad).reshape(ctx.shape), None, None


def is_old(tensors: Mapping[str, Tensor], shape: Shape) -> bool:
    """Whether a1 and b2 have the shapes of old files, and not those of new ones."""
    if not all(name in tensors and tensors[name].ndim > 1 for name in NAMES):
        return False
    sizes = {name: tuple(tensors[name].shape[:2]) for name in NAMES}
    rank = sizes["a1.weight"][0]
    old = (sizes["a2.weight"], sizes["b2.weight"]) == ((shape[1], rank), (shape[0], rank))
    rank = sizes["a2.weight"][0]
    new = (sizes["a1.weight"], sizes["b1.weight"]) == ((shape[1], rank), (shape[0], rank))
    return old and not new


def _times(weight: Tensor, factor: Tensor) -> Tensor:
    """`factor` (M, N) on the channels of `weight` (O, M, *K): (O, N, *K)."""
    if weight.ndim == 2:
        return weight @ factor
    return torch.einsum("om...,mn->on...", weight, factor)


def _crossed(one: Tensor, other: Tensor) -> Tensor:
    """Σ over all axes but the channels: (O, M, *K) and (O, N, *K) to (M, N)."""
    return one.transpose(0, 1).flatten(1) @ other.transpose(0, 1).flatten(1).t()


def _sizes(shape: Shape, rank: int) -> dict[str, Shape]:
    ones = (1,) * (len(shape) - 2)
    return {
        "a1.weight": (shape[1], rank, *ones),
        "a2.weight": (rank, shape[1], *ones),
        "b1.weight": (shape[0], rank, *ones),
        "b2.weight": (rank, *shape[1:]),
    }
