"""LoRA on Linear layers and on convolutions (LoCon).

    y = W x + (alpha / rank) · up · down · x

LoRA: https://arxiv.org/abs/2106.09685 (equation 3). LoCon: https://arxiv.org/abs/2309.14859
(section 3.1): `down` is a convolution with the layer's kernel, stride and padding, `up` a 1x1 one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from .base import Adapter, Layer
from .low_rank import AddConv, AddLinear
from .narrow_conv import convolution


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
        missing = sorted(cls.required - tensors.keys())
        if missing:
            raise ValueError(f"{', '.join(missing)} is missing")
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
            return AddLinear.apply(x, base_out, self.down, self.up, self.scale)
        if self.mid is None:
            return AddConv.apply(x, base_out, self.down, self.up, self.scale, layer)
        narrow = convolution(x, self.down.to(x.dtype), None)
        middle = convolution(narrow, self.mid.to(x.dtype), layer)
        return base_out + self.scale * convolution(middle, self.up.to(x.dtype), None)


def _same_layout(found: torch.Size, expected: tuple[int, ...]) -> bool:
    """Equal shapes, or one is the other flattened behind the second axis (files hold both)."""
    if tuple(found) == expected:
        return True
    flat = (expected[0], math.prod(expected[1:]))
    return tuple(found) == flat or (
        tuple(found[:2]) == expected[:2] and math.prod(found[2:]) == math.prod(expected[2:]) == 1
    )
