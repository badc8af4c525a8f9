"""What a way to merge is. A new one is one file and one entry in the registry."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Parameter:
    """A number that a method takes."""

    default: float
    least: float
    most: float
    help: str


class Method(abc.ABC):
    """How the changes of one layer, ΔW_1 to ΔW_N at the strengths s, become one change D.

    Class attributes: `name` and `help` for the node, `parameters` by name, `most` the number of
    LoRAs that it can merge, None for any.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    parameters: ClassVar[Mapping[str, Parameter]] = {}
    most: ClassVar[int | None] = None

    def __init__(self, **given: float) -> None:
        """Raises ValueError for parameters that the method lacks, and for values out of range."""
        self.given = {name: known.default for name, known in self.parameters.items()} | given
        problems = []
        for name, value in given.items():
            known = self.parameters.get(name)
            if known is None:
                problems.append(f"{self.name} has no {name}")
            elif not known.least <= value <= known.most:
                problems.append(f"{name} is {value:g}, expected {known.least:g} to {known.most:g}")
        if problems:
            raise ValueError("; ".join(problems))

    def check(self, count: int) -> None:
        """Raises ValueError for a number of LoRAs that the method can't merge."""
        if self.most is not None and count > self.most:
            raise ValueError(f"{self.name} merges {self.most} LoRAs, there are {count}")


class FactoredMethod(Method):
    """D = Σ c_i ΔW_i, with coefficients that depend on inner products alone: exact in factors."""

    @abc.abstractmethod
    def coefficients(self, gram: Tensor, strengths: Sequence[float]) -> list[float]:
        """c, by the Gram matrix (N, N) of the ΔWs at strength 1, float64, zeros where one has
        none. Where `needs_gram` is False it is not made, and all zeros."""

    @property
    def needs_gram(self) -> bool:
        return True


class ElementMethod(Method):
    """D by each element of the ΔWs, which are made dense, one layer at a time."""

    @abc.abstractmethod
    def combine(
        self, changes: Tensor, strengths: Sequence[float], generator: torch.Generator
    ) -> Tensor:
        """D (O, ...) of the ΔWs (N, O, ...) at strength 1, float32. May write into `changes`."""
