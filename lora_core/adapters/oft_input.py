"""OFT as PEFT has it: a rotation of the layer's inputs in blocks.

    W' = W Rᵀ,   Q = U - Uᵀ of each block, U the upper triangle that the file holds
    R = (1 - Q)(1 + Q)⁻¹,   or its series cut off:   R = 1 + 2Q + 2Q² + ... + 2Qⁿ⁻¹ + Qⁿ, Q for -Q

https://arxiv.org/abs/2306.07280, by PEFT tuners/oft/layer.py (`_cayley_batch`, `merge`). The two
turn the other way round: the series is that of (1 + Q)(1 - Q)⁻¹. A convolution's inputs are those
of its flattened kernel, as PEFT merges them; its forward adds up overlapping patches, which no
change of a weight does. Letters as in rotation.py; C the columns, I · prod(K).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from .base import Adapter, Axes, Built
from .create_options import DEFAULT, CreateOptions
from .fitting import Shape, fitted
from .rotation import cayley, divisors, nearest

VALUES, TERMS = "oft_R.weight", "oft_R.terms"
MAX_TERMS = 100


class InputOFT(Adapter):
    """`oft_R.weight` (N, B · (B - 1) / 2), the blocks' upper triangles by rows, N · B = C, or N = 1
    for one block that is the same everywhere; `oft_R.terms`, which PEFT keeps in its settings:
    0 for the exact R, else its `num_cayley_neumann_terms`, at least 2.

    A form of the type oft: `OFT.create` with `options.on_input` makes it, for tests and tools.
    """

    name: ClassVar[str] = "oft"
    forms: ClassVar = (frozenset({VALUES}),)
    optional: ClassVar = frozenset({TERMS})
    has_alpha: ClassVar[bool] = False

    def __init__(self, values: Tensor, terms: int, shape: Shape) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.rank, self.alpha = _size(values.shape[1]), 1.0
        self.terms = terms
        self.values = nn.Parameter(values)

    @classmethod
    def create(
        cls,
        shape: Shape,
        rank: int,
        alpha: float,
        *,
        options: CreateOptions = DEFAULT,
        generator: torch.Generator | None = None,
    ) -> InputOFT:
        """Zeros, with the exact R. B is the largest divisor of C that is at most `rank`, or its
        smallest above 1. Raises ValueError for rank < 1 and a layer with one column.
        """
        columns = math.prod(shape[1:])
        problems = [] if rank > 0 else [f"rank is {rank}; a block needs at least 1"]
        problems += [] if columns > 1 else ["the layer has one input, which can't rotate"]
        if problems:
            raise ValueError("; ".join(problems))
        size = nearest(divisors(columns), rank)
        return cls(torch.zeros(columns // size, size * (size - 1) // 2), 0, shape)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: Shape) -> InputOFT:
        """See `Adapter.from_tensors`."""
        problems = [f"{name} does not go with {VALUES}" for name in tensors if name in _OTHERS]
        wanted: dict[str, Shape] = {VALUES: ()}
        if VALUES in tensors:
            wanted[VALUES] = tuple(tensors[VALUES].shape)
            problems += [text for text in (_misfit(wanted[VALUES], math.prod(shape[1:])),) if text]
        terms = tensors.get(TERMS)
        if terms is None:
            problems.append(
                f"how {VALUES} is turned into rotations is not known: PEFT keeps that in"
                " adapter_config.json, which is not with these tensors"
            )
        elif terms.numel() != 1 or terms.item() not in (0, *range(2, MAX_TERMS + 1)):
            shown = f"{terms.item():g}" if terms.numel() == 1 else f"of shape {tuple(terms.shape)}"
            problems.append(f"{TERMS} is {shown}, expected 0 or 2 to {MAX_TERMS}")
        found = fitted(tensors, wanted, problems)
        assert terms is not None
        return cls(found[VALUES], int(terms.item()), shape)

    def tensors(self) -> dict[str, Tensor]:
        return {VALUES: self.values.detach(), TERMS: torch.tensor(self.terms)}

    def row_axes(self) -> Axes:
        """The inputs of all rows turn alike."""
        return {}

    @property
    def needs_all_rows(self) -> bool:
        return True

    @property
    def needs_weight(self) -> bool:
        return True

    def delta(self, weight: Tensor) -> Tensor:
        """W (Rᵀ - 1), block by block."""
        turns = self._turns()
        rows = weight.to(turns.dtype).flatten(1).unflatten(1, (-1, self.rank))  # (O, N, B)
        turns = turns.expand(rows.shape[1], -1, -1)
        change = torch.einsum("onk,nkc->onc", rows, turns)
        return change.reshape(weight.shape).to(weight.dtype)

    @torch.no_grad()
    def delta_gradients(
        self, weight: Tensor, grad: Tensor, built: Built
    ) -> tuple[Tensor | None, ...]:
        """Through the rotations, that of a block being Wᵀ G of its columns."""
        with torch.enable_grad():
            turns = self._turns()
        rows, grads = (
            tensor.to(turns.dtype).flatten(1).unflatten(1, (-1, self.rank))
            for tensor in (weight, grad)
        )
        found = torch.einsum("onk,onc->nkc", rows, grads)
        return self.gradients_through([turns], [found.sum_to_size(turns.shape)])

    def _turns(self) -> Tensor:
        """Rᵀ - 1 of each block, (N, B, B), in float32 or better."""
        values = self.values if self.values.dtype == torch.float64 else self.values.float()
        row, column = torch.triu_indices(self.rank, self.rank, 1, device=values.device)
        upper = values.new_zeros(len(values), self.rank, self.rank)
        upper = upper.index_put((torch.arange(len(values))[:, None], row, column), values)
        if self.terms == 0:
            return cayley(upper, 0.0)
        turned = upper.mT - upper
        change, power = 2.0 * turned, turned
        last = max(self.terms, 4) - 1 if self.terms > 2 else 1  # PEFT's 3 are the same as its 4
        for number in range(2, last + 1):
            power = power @ turned
            change = change + (1.0 if number == last else 2.0) * power
        return change


_OTHERS = ("oft_blocks", "rescale")


def _size(values: int) -> int:
    """B of B · (B - 1) / 2 values, rounded down."""
    return (1 + math.isqrt(1 + 8 * values)) // 2


def _misfit(found: Shape, columns: int) -> str:
    """What is wrong with blocks of this shape for C columns; "" if nothing is."""
    if len(found) == 2 and found[1] > 0:
        count, size = found[0], _size(found[1])
        fits = count * size == columns or count == 1 and columns % size == 0
        if size * (size - 1) // 2 == found[1] and fits:
            return ""
    return (
        f"{VALUES} is {found}, expected (N, B · (B - 1) / 2) with N · B = {columns}, or N = 1 and a"
        " B that divides it"
    )
