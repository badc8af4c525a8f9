"""A throw-away adapter type, as one would add it: a class, its formula, an entry for each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_weave.lora_core.adapters import ADAPTERS, Adapter
from lora_weave.lora_core.adapters.create_options import DEFAULT, CreateOptions

from .closed_forms import FORMULAS, Formula, zero


class Rows(Adapter):
    """ΔW = alpha · diag(a) · 1: each row of W is moved by a number of its own."""

    name: ClassVar[str] = "rows"
    help: ClassVar[str] = "for a test only."
    forms: ClassVar = (frozenset({"rows_a"}),)

    def __init__(self, values: Tensor, alpha: float, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.values = nn.Parameter(values)
        self.alpha, self.shape, self.rank = float(alpha), tuple(shape), 1

    @classmethod
    def create(
        cls,
        shape: tuple[int, ...],
        rank: int,
        alpha: float,
        *,
        options: CreateOptions = DEFAULT,
        generator: torch.Generator | None = None,
    ) -> Rows:
        if rank < 1:
            raise ValueError(f"rank is {rank}; at least 1 is needed")
        return cls(torch.zeros(shape[0]), alpha, shape)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Rows:
        if "rows_a" not in tensors:
            raise ValueError("rows_a is missing")
        if tuple(tensors["rows_a"].shape) != shape[:1]:
            raise ValueError(f"rows_a is {tuple(tensors['rows_a'].shape)}, expected {shape[:1]}")
        return cls(tensors["rows_a"], tensors["alpha"].item(), shape)

    def tensors(self) -> dict[str, Tensor]:
        return {"rows_a": self.values.detach(), "alpha": torch.tensor(self.alpha)}

    def delta(self, weight: Tensor) -> Tensor:
        ones = torch.ones(self.shape[0], math.prod(self.shape[1:]), dtype=self.values.dtype)
        return (self.alpha * self.values.diag() @ ones).reshape(weight.shape)


def change(tensors: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """alpha · a[o] at every place of row o."""
    rows = [torch.full_like(weight[0], float(a)) for a in tensors["rows_a"]]
    return tensors["alpha"] * torch.stack(rows)


def register() -> None:
    ADAPTERS[Rows.name] = Rows
    FORMULAS[Rows.name] = Formula(change, lambda name, shape: zero())
