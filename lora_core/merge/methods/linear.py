"""D = Σ s_i ΔW_i, as a stack applies them; or the same with strengths that are parts of a whole."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...blend import blend
from .base import FactoredMethod


class Sum(FactoredMethod):
    """Task arithmetic, https://arxiv.org/abs/2212.04089 (section 2): c = s."""

    name = "sum"
    help = "what the stack does at these strengths."

    def coefficients(self, gram: Tensor, strengths: Sequence[float]) -> list[float]:
        return list(strengths)

    @property
    def needs_gram(self) -> bool:
        return False


class Normalised(Sum):
    """c = s / Σ|s|: the stack's "sum to 1"."""

    name = "normalised"
    help = "the sum, with strengths that are parts of one whole."

    def coefficients(self, gram: Tensor, strengths: Sequence[float]) -> list[float]:
        return blend(strengths, "sum to 1")
