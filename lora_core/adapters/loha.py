"""LoHa: the Hadamard product of two low-rank matrices.

    ΔW = (alpha / rank) · (w1_a @ w1_b) ∘ (w2_a @ w2_b)

FedPara, https://arxiv.org/abs/2108.06098 (proposition 1), for images by LyCORIS,
https://arxiv.org/abs/2309.14859 (section 3.1). A rank of r gives a ΔW of a rank up to r², and
exactly so: its factors are the row-wise Khatri-Rao products of the four.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from .base import Axes
from .create_options import DEFAULT, CreateOptions
from .dora import Decomposable
from .fitting import Shape, alpha_of, first_size, fitted

NAMES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
CORES = ("hada_t1", "hada_t2")


class LoHa(Decomposable):
    """Tensors as LyCORIS writes them: `hada_w1_a` (O, R), `hada_w1_b` (R, I · prod(K)), and so w2.

    In the Tucker form `hada_t1`, `hada_t2` are (R, R, *K), w_a is (R, O) and w_b (R, I), and each
    matrix is Σ t[i, j, k] · w_a[i, o] · w_b[j, n].
    """

    name: ClassVar[str] = "loha"
    help: ClassVar[str] = (
        "the Hadamard product of two low-rank changes: rank squared in a small file."
    )
    forms: ClassVar = (frozenset(NAMES),)
    optional: ClassVar = frozenset({*CORES, "dora_scale"})

    def __init__(self, parts: Mapping[str, Tensor], alpha: float, shape: Shape) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.rank = parts["hada_w1_b"].shape[0]
        self.alpha = float(alpha)
        self.parts = nn.ParameterDict({name: nn.Parameter(part) for name, part in parts.items()})

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
    ) -> LoHa:
        """w1_a ~ N(0, 0.1²), w1_b and w2_b ~ N(0, 1), w2_a = 0, so that ΔW starts at zero.

        As LyCORIS documents it (loha.py `HadaWeight`); cores ~ N(0, 0.1²). Raises for rank < 1.
        """
        if rank < 1:
            raise ValueError(f"rank is {rank}; a LoHa needs at least 1")
        tucker = options.tucker and math.prod(shape[2:]) > 1
        deviations = {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_a": 0.0, "hada_w2_b": 1.0}
        deviations |= dict.fromkeys(CORES, 0.1) if tucker else {}
        parts = {
            name: std * torch.randn(size, generator=generator, dtype=torch.float32)
            for (name, size), std in zip(
                _sizes(shape, rank, rank, tucker).items(), deviations.values(), strict=True
            )
        }
        return cls(parts, alpha, shape)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: Shape) -> LoHa:
        """See `Adapter.from_tensors`. Both pairs have a rank of their own; alpha is over w1's."""
        missing = [name for name in NAMES if name not in tensors]
        if missing:
            raise ValueError(f"{', '.join(missing)} is missing")
        tucker = any(name in tensors for name in CORES)
        ranks = [first_size(tensors, name) for name in ("hada_w1_b", "hada_w2_b")]
        problems = [] if all(ranks) else [f"the ranks of hada_w1_b and hada_w2_b are {ranks}"]
        parts = fitted(tensors, _sizes(shape, ranks[0], ranks[1], tucker), problems)
        loha = cls(parts, alpha_of(tensors, ranks[0]), shape)
        loha.take_magnitude(tensors)
        return loha

    def tensors(self) -> dict[str, Tensor]:
        named = {name: part.detach() for name, part in self.parts.items()}
        named["alpha"] = torch.tensor(self.alpha, dtype=torch.float32)
        return self.with_magnitude(named)

    def row_axes(self) -> Axes | None:
        axis = 1 if CORES[0] in self.parts else 0
        return self.magnitude_axes({name: (axis, 1) for name in ("hada_w1_a", "hada_w2_a")})

    def last_factors(self) -> list[nn.Parameter]:
        return [self.parts["hada_w2_a"]]

    def change(self) -> Tensor:
        first, second = (left @ right for left, right in self._pairs())
        return (self.scale * first * second).reshape(self.shape)

    @torch.no_grad()
    def change_gradients(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of each product that of ΔW times the other one; only one of them is there at a time."""
        with torch.enable_grad():
            pairs = self._pairs()
        made, grads = [], []
        for (left, right), (other_left, other_right) in zip(pairs, pairs[::-1], strict=True):
            share = (self.scale * other_left @ other_right).mul_(grad.flatten(1))
            made += [left, right]
            grads += [share @ right.t(), left.t() @ share]
        return self.gradients_through(made, grads)

    def change_factors(self) -> tuple[Tensor, Tensor]:
        """U (O, R²) and V (R², I · prod(K)): column ij of U is w1_a[:, i] ∘ w2_a[:, j], so V."""
        (left1, right1), (left2, right2) = self._pairs()
        up = (left1[:, :, None] * left2[:, None, :]).flatten(1)
        down = (right1[:, None, :] * right2[None, :, :]).flatten(0, 1)
        return self.scale * up, down

    @property
    def change_rank(self) -> int:
        return self.rank * self.parts["hada_w2_b"].shape[0]

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """((O, R), (R, I · prod(K))) of w1 and of w2, a core folded into the right one."""
        pairs = []
        for number in (1, 2):
            left, right = self.parts[f"hada_w{number}_a"], self.parts[f"hada_w{number}_b"]
            if (core := f"hada_t{number}") in self.parts:
                left = left.t()
                right = torch.einsum("ij...,jn->in...", self.parts[core], right).flatten(1)
            pairs.append((left, self.masked(right) if number == 1 else right))
        return pairs


def _sizes(shape: Shape, rank1: int, rank2: int, tucker: bool) -> dict[str, Shape]:
    """The shapes of the tensors of a layer of `shape`, in the order of NAMES and CORES."""
    out, into, kernel = shape[0], shape[1], shape[2:]
    if tucker:
        return {
            "hada_w1_a": (rank1, out),
            "hada_w1_b": (rank1, into),
            "hada_w2_a": (rank2, out),
            "hada_w2_b": (rank2, into),
            "hada_t1": (rank1, rank1, *kernel),
            "hada_t2": (rank2, rank2, *kernel),
        }
    wide = math.prod(shape[1:])
    return {
        "hada_w1_a": (out, rank1),
        "hada_w1_b": (rank1, wide),
        "hada_w2_a": (out, rank2),
        "hada_w2_b": (rank2, wide),
    }
