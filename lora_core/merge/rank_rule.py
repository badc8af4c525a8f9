"""How many directions of a change are kept, by its singular values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RULES = {
    "rank": "so many of them.",
    "energy": "as many as hold this share of the sum of their squares, such as 0.95.",
    "frobenius": "as many as hold this share of the change's norm, the root of the energy.",
    "ratio": "those that are at least the largest divided by this.",
}
SHARES = ("energy", "frobenius")


@dataclass(frozen=True)
class RankRule:
    """One of RULES with its number, and the most that a layer may have.

    Raises ValueError for an unknown rule, and for numbers that it can't have.
    """

    kind: str
    value: float
    largest: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.kind not in RULES:
            problems.append(f"unknown rule {self.kind!r}; known: {', '.join(RULES)}")
        elif self.kind in SHARES and not 0 < self.value <= 1:
            problems.append(f"{self.kind} is {self.value:g}, expected more than 0, at most 1")
        elif self.kind not in SHARES and not (self.value >= 1 and math.isfinite(self.value)):
            problems.append(f"{self.kind} is {self.value:g}, expected 1 or more")
        elif self.kind == "rank" and self.value != int(self.value):
            problems.append(f"rank is {self.value:g}, expected a whole number")
        if self.largest is not None and self.largest < 1:
            problems.append(f"the largest rank is {self.largest}, expected 1 or more")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def most(self) -> int | None:
        """The most directions that any change keeps; None where only its sizes tell."""
        fixed = int(self.value) if self.kind == "rank" else None
        limits = [limit for limit in (fixed, self.largest) if limit is not None]
        return min(limits, default=None)

    def choose(self, sizes: Tensor) -> int:
        """The number of directions to keep, at least 1, by all singular values, largest first.

        Directions of a size that is rounding are never kept, whatever the rule.
        """
        sizes = sizes.double()
        real = int((sizes > sizes[0] * torch.finfo(torch.float32).eps).sum())
        limit = max(1, min(real, self.most or real))
        if self.kind == "rank" or real == 0:
            return limit
        if self.kind == "ratio":
            return min(limit, int((sizes >= sizes[0] / self.value).sum()))
        shares = sizes.square().cumsum(0) / sizes.square().sum()
        share = self.value**2 if self.kind == "frobenius" else self.value
        # The first k whose share is enough; rounding may leave the last just under 1.
        return min(limit, int((shares < share * (1 - 1e-12)).sum()) + 1)
