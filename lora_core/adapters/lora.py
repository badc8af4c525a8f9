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

from .add_change import is_cheaper
from .base import Axes
from .create_options import DEFAULT, CreateOptions
from .dora import Decomposable
from .fitting import alpha_of, first_size, fitted
from .layer import Layer
from .low_rank import add_low_rank
from .narrow_conv import convolution


class LoRA(Decomposable):
    """ΔW = (alpha / rank) · up @ down, flattened to (O, I · prod(K)).

    Tensors, named as kohya's sd-scripts and LyCORIS do: `lora_up.weight` (O, R) or (O, R, 1...),
    `lora_down.weight` (R, I) or (R, I, *K); with `lora_mid.weight` (R, R, *K) the Tucker form,
    whose down is (R, I, 1...). Files may hold them flattened; here they have the layer's rank.
    """

    name: ClassVar[str] = "lora"
    help: ClassVar[str] = "two narrow matrices a layer, on convolutions as LoCon. Loads everywhere."
    forms: ClassVar = (frozenset({"lora_up.weight", "lora_down.weight"}),)
    optional: ClassVar = frozenset({"lora_mid.weight", "dora_scale"})

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
        self.origin_up: Tensor | None
        self.origin_down: Tensor | None
        self.register_buffer("origin_up", None, persistent=False)
        self.register_buffer("origin_down", None, persistent=False)

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
        options: CreateOptions = DEFAULT,
        generator: torch.Generator | None = None,
    ) -> LoRA:
        """down (and mid) ~ U(±1/√fan_in), which is kaiming_uniform(a=√5), and up = 0: ΔW is zero.

        As in microsoft/LoRA loralib/layers.py `reset_parameters`. Raises ValueError for rank < 1.
        """
        if rank < 1:
            raise ValueError(f"rank is {rank}; a LoRA needs at least 1")
        kernel, ones = shape[2:], (1,) * (len(shape) - 2)
        tucker = options.tucker and math.prod(kernel) > 1
        down = uniform((rank, shape[1], *(ones if tucker else kernel)), generator)
        mid = uniform((rank, rank, *kernel), generator) if tucker else None
        up = torch.zeros((shape[0], rank, *ones), dtype=torch.float32)
        return cls(up, down, alpha, shape, mid)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> LoRA:
        """See `Adapter.from_tensors`. No alpha means alpha = rank (scale 1)."""
        rank, ones = first_size(tensors, "lora_down.weight"), (1,) * (len(shape) - 2)
        is_tucker = "lora_mid.weight" in tensors
        wanted = {
            "lora_up.weight": (shape[0], rank, *ones),
            "lora_down.weight": (rank, shape[1], *(ones if is_tucker else shape[2:])),
        }
        if is_tucker:
            wanted["lora_mid.weight"] = (rank, rank, *shape[2:])
        problems = [] if rank else ["lora_down.weight has a rank of 0"]
        found = fitted(tensors, wanted, problems)
        lora = cls(
            found["lora_up.weight"],
            found["lora_down.weight"],
            alpha_of(tensors, rank),
            shape,
            found.get("lora_mid.weight"),
        )
        lora.take_magnitude(tensors)
        return lora

    @torch.no_grad()
    def begin_at_principal(self, weight: Tensor) -> None:
        """Begin at the strongest directions of W, B0 A0 ≈ W, and train the difference to them.

        PiSSA, https://arxiv.org/abs/2404.02948 (equations 2 and 3): up and down are √σ times W's
        first singular vectors. The paper takes B0 A0 out of W; here W stays as it is, and

            ΔW = up · down - B0 · A0 = (up - B0) · down + B0 · (down - A0)

        which is zero at the start to the last bit, and of twice the rank. In the second form no
        large terms cancel, so that a file in float16 keeps it. The same numbers for the same W.
        """
        wide = weight.detach().to("cpu", torch.float32).flatten(1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, sizes, right = torch.svd_lowrank(
                wide, q=min(2 * self.rank + 8, *wide.shape), niter=4
            )
        roots = (sizes[: self.rank] / self.scale).sqrt()
        rank = len(roots)
        self.up.data[:, :rank] = (left[:, :rank] * roots).view(len(left), rank, *self.up.shape[2:])
        self.down.data[:rank] = (right[:, :rank] * roots).t().view(rank, *self.down.shape[1:])
        self.origin_up, self.origin_down = self.up.detach().clone(), self.down.detach().clone()
        self.alpha, self.rank = 2.0 * self.alpha, 2 * self.rank

    def _whole(self) -> tuple[Tensor, Tensor]:
        """(up, down) of ΔW, before any mask: what is trained, or beside where it began."""
        if self.origin_up is None or self.origin_down is None:
            return self.up, self.down
        ups = [self.up - self.origin_up, self.origin_up]
        downs = [self.down, self.down - self.origin_down]
        return torch.cat(ups, 1), torch.cat(downs, 0)

    def tensors(self) -> dict[str, Tensor]:
        up, down = self._whole()
        named = {"lora_up.weight": up.detach(), "lora_down.weight": down.detach()}
        if self.mid is not None:
            named["lora_mid.weight"] = self.mid.detach()
        named["alpha"] = torch.tensor(self.alpha, dtype=torch.float32)
        return self.with_magnitude(named)

    def row_axes(self) -> Axes | None:
        return self.magnitude_axes({"lora_up.weight": (0, 1)})

    def last_factors(self) -> list[nn.Parameter]:
        return [self.up] if self.origin_up is None else []

    def change_factors(self) -> tuple[Tensor, Tensor]:
        """U = scale · up (O, R) and V = down (R, I · prod(K)), mid folded into V."""
        up, down = self._whole()
        down = self.masked(down)
        if self.mid is not None:
            down = torch.einsum("mn...,ni->mi...", self.mid, down.flatten(1))
        return self.scale * up.flatten(1), down.flatten(1)

    def scaled_factors(self) -> tuple[float, Tensor, Tensor]:
        """See `Adapter.scaled_factors`; up and down themselves, but for a Tucker form."""
        if self.mid is not None or self.magnitude is not None or self.rank_mask is not None:
            return super().scaled_factors()
        up, down = self._whole()
        return self.scale, up.flatten(1), down.flatten(1)

    @property
    def change_rank(self) -> int:
        return self.rank

    def change(self) -> Tensor:
        up, down = self.change_factors()
        return (up @ down).reshape(self.shape)

    @torch.no_grad()
    def change_gradients(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Through the factors: G Vᵀ and Uᵀ G."""
        with torch.enable_grad():
            up, down = self.change_factors()
        flat = grad.flatten(1)
        return self.gradients_through([up, down], [flat @ down.t(), up.t() @ flat])

    def is_factored(self, layer: Layer, base_out: Tensor) -> bool:
        """Whether the factors take fewer multiplications than their product ΔW.

        They do unless the rank is near O · I·K / (O + I·K), where ΔW is the smaller, too.
        """
        if self.mid is None:
            return super().is_factored(layer, base_out)
        per_position = self.rank * (layer.shape[1] + self.mid[0].numel() + layer.shape[0])
        to_build = self.rank * layer.fan_in * (self.rank + layer.shape[0])
        return is_cheaper(per_position, to_build, layer, base_out)

    def add(self, x: Tensor, base_out: Tensor, layer: Layer) -> Tensor:
        """x is (..., I) or (B, I, *spatial), base_out the layer's output for it, any float dtype.

        The factors are cast to x's dtype for the products; their gradients come back in float32.
        """
        up, down = self._whole()
        down = self.masked(down)
        if self.mid is None:
            return add_low_rank(x, base_out, down, up, self.scale, layer)
        narrow = convolution(x, down.to(x.dtype), None)
        middle = convolution(narrow, self.mid.to(x.dtype), layer)
        return base_out + self.scale * convolution(middle, self.up.to(x.dtype), None)


def uniform(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """U(±1/√fan_in) of a weight of `shape`: torch's kaiming_uniform(a=√5)."""
    bound = 1.0 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
