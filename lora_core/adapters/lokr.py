"""LoKr: the Kronecker product of a small matrix and a larger one, which may be low-rank.

    ΔW = scale · w1 ⊗ w2,   w1 = w1_a @ w1_b or whole,   w2 = w2_a @ w2_b or whole

KronA, https://arxiv.org/abs/2212.10650, for images by LyCORIS, https://arxiv.org/abs/2309.14859
(section 3.2). Letters: w1 (L, M) and w2 (J, N, *K) with O = L · J and I = M · N.
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
from .fitting import Shape, alpha_of, first_size, fitted
from .kronecker import add_kronecker, cost_per_position, kron
from .layer import Layer
from .lora import uniform

PAIRS = {"lokr_w1": ("lokr_w1_a", "lokr_w1_b"), "lokr_w2": ("lokr_w2_a", "lokr_w2_b")}
CORE = "lokr_t2"


class LoKr(Decomposable):
    """Tensors as LyCORIS writes them: `lokr_w1` (L, M) or `lokr_w1_a` (L, R), `lokr_w1_b` (R, M);
    `lokr_w2` (J, N, *K) or `lokr_w2_a` (J, R), `lokr_w2_b` (R, N · prod(K)).

    In the Tucker form `lokr_t2` is (R, R, *K), `lokr_w2_a` (R, J) and `lokr_w2_b` (R, N). The
    scale is alpha / R, and 1 where both are whole, whatever alpha says (as LyCORIS and the host).
    """

    name: ClassVar[str] = "lokr"
    help: ClassVar[str] = "a Kronecker product: the smallest files; lokr_factor sets its blocks."
    forms: ClassVar = tuple(
        frozenset(first) | frozenset(second)
        for first in (("lokr_w1",), PAIRS["lokr_w1"])
        for second in (("lokr_w2",), PAIRS["lokr_w2"])
    )
    optional: ClassVar = frozenset({CORE, "dora_scale"})

    def __init__(self, parts: Mapping[str, Tensor], alpha: float, shape: Shape) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.parts = nn.ParameterDict({name: nn.Parameter(part) for name, part in parts.items()})
        self.is_whole = not _rank(parts)
        self.rank = _rank(parts) or self.change_rank
        self.alpha = float(alpha)

    @property
    def scale(self) -> float:
        return 1.0 if self.is_whole else self.alpha / self.rank

    @classmethod
    def create(
        cls,
        shape: Shape,
        rank: int,
        alpha: float,
        *,
        options: CreateOptions = DEFAULT,
        generator: torch.Generator | None = None,
    ) -> LoKr:
        """w1 and w2_a ~ U(±1/√fan_in), w2 or w2_b = 0, so that ΔW starts at zero.

        w2 is a product where that is smaller: rank < max(J, N) / 2; w1 the same by its own sizes,
        if `options.decompose_both`. As in LyCORIS lokr.py. Raises ValueError for rank < 1.
        """
        if rank < 1:
            raise ValueError(f"rank is {rank}; a LoKr needs at least 1")
        (rows1, rows2), (columns1, columns2) = (
            factorization(size, options.factor) for size in shape[:2]
        )
        kernel = shape[2:]
        sizes: dict[str, Shape] = {"lokr_w1": (rows1, columns1)}
        if options.decompose_both and rank < max(rows1, columns1) / 2:
            sizes = {"lokr_w1_a": (rows1, rank), "lokr_w1_b": (rank, columns1)}
        if rank >= max(rows2, columns2) / 2:
            sizes["lokr_w2"] = (rows2, columns2, *kernel)
        elif options.tucker and math.prod(kernel) > 1:
            sizes |= {CORE: (rank, rank, *kernel), "lokr_w2_a": (rank, rows2)}
            sizes["lokr_w2_b"] = (rank, columns2)
        else:
            wide = columns2 * math.prod(kernel)
            sizes |= {"lokr_w2_a": (rows2, rank), "lokr_w2_b": (rank, wide)}
        parts = {
            name: torch.zeros(size)
            if name in ("lokr_w2", "lokr_w2_b")
            else uniform(size, generator)
            for name, size in sizes.items()
        }
        return cls(parts, alpha, shape)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: Shape) -> LoKr:
        """See `Adapter.from_tensors`. The blocks' sizes are the file's: tools cut differently."""
        wanted = _sizes_in(tensors, shape)
        parts = fitted(tensors, wanted, _misfits(wanted, shape))
        lokr = cls(parts, 0.0, shape)
        lokr.alpha = alpha_of(tensors, lokr.rank)
        lokr.take_magnitude(tensors)
        return lokr

    def tensors(self) -> dict[str, Tensor]:
        named = {name: part.detach() for name, part in self.parts.items()}
        named["alpha"] = torch.tensor(self.alpha, dtype=torch.float32)
        return self.with_magnitude(named)

    def row_axes(self) -> Axes | None:
        """A row of w1 is as many of the layer as w2 has, so rows can be cut between those."""
        name = "lokr_w1" if "lokr_w1" in self.parts else "lokr_w1_a"
        return self.magnitude_axes({name: (0, self.shape[0] // self.parts[name].shape[0])})

    def last_factors(self) -> list[nn.Parameter]:
        return [self.parts["lokr_w2" if "lokr_w2" in self.parts else "lokr_w2_b"]]

    def w1(self) -> tuple[Tensor, Tensor | None]:
        """(left, right) of w1 = left @ right, or (w1, None)."""
        return self._pair("lokr_w1")

    def w2(self) -> tuple[Tensor, Tensor | None]:
        """(left (J, R), right (R, N, *K)) of w2 = left @ right, or (w2 (J, N, *K), None)."""
        left, right = self._pair("lokr_w2")
        kernel = self.shape[2:]
        if right is None:
            return left, None
        if CORE in self.parts:
            right = torch.einsum("ij...,jn->in...", self.parts[CORE], right)
            return left.t(), self.masked(right)
        return left, self.masked(right.unflatten(1, (-1, *kernel)) if kernel else right)

    def change(self) -> Tensor:
        first, second = self.blocks()
        return self.scale * kron(first, second).reshape(self.shape)

    @torch.no_grad()
    def change_gradients(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of w1 by the product with w2 over J and N, of w2 by that with w1 over L and M."""
        with torch.enable_grad():
            first, second = self.blocks()
        parts = grad.reshape(len(first), len(second), first.shape[1], second.shape[1])
        grad_first = torch.einsum("ljmn,jn->lm", parts, self.scale * second)
        grad_second = torch.einsum("ljmn,lm->jn", parts, self.scale * first)
        return self.gradients_through([first, second], [grad_first, grad_second])

    def change_factors(self) -> tuple[Tensor, Tensor]:
        """(U1 ⊗ U2, V1 ⊗ V2): a whole block is itself times the identity on its shorter side."""
        ups, downs = [], []
        for left, right in (self.w1(), self.w2()):
            if right is None:
                flat = left.flatten(1)
                eye = torch.eye(min(flat.shape), dtype=flat.dtype, device=flat.device)
                left, right = (eye, flat) if flat.shape[0] <= flat.shape[1] else (flat, eye)
            ups.append(left)
            downs.append(right.flatten(1))
        return self.scale * kron(*ups), kron(*downs)

    @property
    def change_rank(self) -> int:
        ranks = [
            min(left.shape[0], left.flatten(1).shape[1]) if right is None else right.shape[0]
            for left, right in (self.w1(), self.w2())
        ]
        return math.prod(ranks)

    def is_factored(self, layer: Layer, base_out: Tensor) -> bool:
        """Whether w1 and w2 one after the other take fewer multiplications than ΔW."""
        area = layer.shape[0] * layer.fan_in
        return is_cheaper(cost_per_position(self.w1(), self.w2()), area, layer, base_out)

    def add(self, x: Tensor, base_out: Tensor, layer: Layer) -> Tensor:
        return add_kronecker(x, base_out, self.w1(), self.w2(), self.scale, layer)

    def blocks(self) -> tuple[Tensor, Tensor]:
        """w1 (L, M) and w2 (J, N · prod(K))."""
        first, second = (
            (left if right is None else left @ right.flatten(1)).flatten(1)
            for left, right in (self.w1(), self.w2())
        )
        return first, second

    def _pair(self, whole: str) -> tuple[Tensor, Tensor | None]:
        if whole in self.parts:
            return self.parts[whole], None
        left, right = PAIRS[whole]
        return self.parts[left], self.parts[right]


def factorization(size: int, factor: int = -1) -> tuple[int, int]:
    """(small, large) with small · large = size: small is the largest divisor that is at most
    `factor` and √size; without a factor (-1) the two are as near to each other as can be.

    A factor that divides the size is kept: (factor, size / factor), the smaller one first. LyCORIS'
    rule (functional/general.py `factorization`); the host's and PEFT's cut otherwise.
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    limit = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    small = next(number for number in range(max(limit, 1), 0, -1) if size % number == 0)
    return small, size // small


def _rank(parts: Mapping[str, Tensor]) -> int:
    """The rank of the products, w2's first as in the host; 0 where both blocks are whole."""
    for name in ("lokr_w2_b", "lokr_w1_b"):
        if name in parts:
            return parts[name].shape[0]
    return 0


def _sizes_in(tensors: Mapping[str, Tensor], shape: Shape) -> dict[str, Shape]:
    """The shapes that the tensors at hand should have, by what one side of each says.

    Raises ValueError for a block that is not there at all.
    """
    form = next((form for form in LoKr.forms if form <= tensors.keys()), None)
    if form is None:
        raise ValueError(
            "one of lokr_w1 or lokr_w1_a, lokr_w1_b and one of lokr_w2 or lokr_w2_a, lokr_w2_b is "
            f"missing; there is only {', '.join(sorted(tensors))}"
        )
    tucker, kernel = CORE in tensors, shape[2:]
    rows1 = first_size(tensors, "lokr_w1" if "lokr_w1" in form else "lokr_w1_a")
    last = tensors["lokr_w1" if "lokr_w1" in form else "lokr_w1_b"]
    columns1 = last.shape[1] if last.ndim > 1 else 0
    rows2 = shape[0] // rows1 if rows1 else 0
    columns2 = shape[1] // columns1 if columns1 else 0
    sizes: dict[str, Shape] = {}
    if "lokr_w1" in form:
        sizes["lokr_w1"] = (rows1, columns1)
    else:
        rank1 = first_size(tensors, "lokr_w1_b")
        sizes |= {"lokr_w1_a": (rows1, rank1), "lokr_w1_b": (rank1, columns1)}
    if "lokr_w2" in form:
        return sizes | {"lokr_w2": (rows2, columns2, *kernel)}
    rank2 = first_size(tensors, "lokr_w2_b")
    if tucker:
        core: Shape = (rank2, rank2, *kernel)
        return sizes | {CORE: core, "lokr_w2_a": (rank2, rows2), "lokr_w2_b": (rank2, columns2)}
    wide = columns2 * math.prod(kernel)
    return sizes | {"lokr_w2_a": (rows2, rank2), "lokr_w2_b": (rank2, wide)}


def _misfits(wanted: Mapping[str, Shape], shape: Shape) -> list[str]:
    """Sizes of w1 that do not divide the layer's, and empty ranks."""
    rows1 = wanted.get("lokr_w1", wanted.get("lokr_w1_a", (0,)))[0]
    columns1 = wanted.get("lokr_w1", wanted.get("lokr_w1_b", (0, 0)))[1]
    problems = [
        f"w1 has {size} {what}, which do not divide the layer's {whole}"
        for size, whole, what in ((rows1, shape[0], "rows"), (columns1, shape[1], "columns"))
        if size == 0 or whole % size
    ]
    if any(0 in size for size in wanted.values()) and not problems:
        problems.append("a rank of 0")
    return problems
