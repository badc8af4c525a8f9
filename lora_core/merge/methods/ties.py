"""Pruned changes, of which at each element only those count that have the elected sign."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import ElementMethod, Parameter
from .pruning import at_random, between, by_rank, largest
from .signs import agreeing

DENSITY = Parameter(0.5, 0.0, 1.0, "the share of each LoRA's elements that is kept.")


class Prune(ElementMethod):
    """D = Σ s_i m_i ∘ ΔW_i, m_i being 1 at the elements of the largest size: magnitude pruning."""

    name = "magnitude prune"
    help = "the sum of the largest elements of each."
    parameters = {"density": DENSITY}

    def combine(
        self, changes: Tensor, strengths: Sequence[float], generator: torch.Generator
    ) -> Tensor:
        return self.weighted(changes, strengths, generator).sum(0)

    def weighted(
        self, changes: Tensor, strengths: Sequence[float], generator: torch.Generator
    ) -> Tensor:
        """The pruned changes at their strengths, written into `changes`."""
        for change, strength in zip(changes, strengths, strict=True):
            change.mul_(self.mask(change, generator)).mul_(strength)
        return changes

    def mask(self, change: Tensor, generator: torch.Generator) -> Tensor:
        """What is left of a change, scale included."""
        return largest(change, self.given["density"])


class Ties(Prune):
    """D = Σ s_i a_i m_i ∘ ΔW_i / Σ |s_i| a_i, a_i being 1 where m_i s_i ΔW_i has the elected sign.

    TIES-Merging, https://arxiv.org/abs/2306.01708 (algorithm 1): trim, elect, disjoint mean, with
    strengths as shares. Divided by their sizes: mergekit divides by the strengths themselves, so
    that a negative one acts as a positive one.
    """

    name = "TIES"
    help = "the mean of the largest elements that agree in sign; strengths are shares."

    def combine(
        self, changes: Tensor, strengths: Sequence[float], generator: torch.Generator
    ) -> Tensor:
        weighted = self.weighted(changes, strengths, generator)
        agree = agreeing(weighted)
        sizes = weighted.new_tensor([abs(s) for s in strengths]).view(-1, *[1] * (agree.ndim - 1))
        counted = (agree * sizes).sum(0)
        total = (weighted * agree).sum(0)
        return total / torch.where(counted > 0, counted, 1.0)


class Dare(Prune):
    """D = Σ s_i m_i ∘ ΔW_i / density, m_i being 1 with a probability of density.

    DARE, https://arxiv.org/abs/2311.03099 (section 3.1): drop at random, rescale by 1 / density.
    """

    name = "DARE"
    help = "elements dropped at random, the rest enlarged to keep the sum."
    parameters = {"density": Parameter(0.5, 0.01, 1.0, DENSITY.help)}

    def mask(self, change: Tensor, generator: torch.Generator) -> Tensor:
        density = self.given["density"]
        return at_random(change, density, generator) / density


class DareTies(Dare):
    """D = Σ s_i a_i m_i ∘ ΔW_i / density: DARE, and of what it leaves only what agrees in sign.

    As mergekit's dare_ties: the sum, where TIES has the mean.
    """

    name = "DARE TIES"
    help = "DARE, of which only the elements count that agree in sign."

    def combine(
        self, changes: Tensor, strengths: Sequence[float], generator: torch.Generator
    ) -> Tensor:
        weighted = self.weighted(changes, strengths, generator)
        return weighted.mul_(agreeing(weighted)).sum(0)


class Breadcrumbs(Prune):
    """D = Σ s_i m_i ∘ ΔW_i, m_i leaving out the largest elements, a share gamma, and the smallest.

    Model Breadcrumbs, https://arxiv.org/abs/2312.06795 (section 3).
    """

    name = "breadcrumbs"
    help = "the sum without the largest and the smallest elements of each."
    parameters = {
        "density": DENSITY,
        "gamma": Parameter(0.01, 0.0, 0.5, "the share of the largest elements that is left out."),
    }

    def mask(self, change: Tensor, generator: torch.Generator) -> Tensor:
        return between(change, self.given["density"], self.given["gamma"])


class Della(DareTies):
    """D = Σ s_i a_i m_i ∘ ΔW_i / p_i, m_i being 1 with the probability p_i of its rank in the row.

    DELLA-Merging, https://arxiv.org/abs/2406.11617 (section 3.1): p from density - epsilon for the
    smallest of a row to density + epsilon for the largest; kept elements are divided by theirs.
    """

    name = "DELLA"
    help = "elements dropped at random, small ones more often, and only what agrees in sign."
    parameters = {
        **Dare.parameters,
        "epsilon": Parameter(0.15, 0.0, 0.49, "how far the smallest and largest are from density."),
    }

    def __init__(self, **given: float) -> None:
        super().__init__(**given)
        density, epsilon = self.given["density"], self.given["epsilon"]
        if density < 1.0 and not (density - epsilon > 0 and density + epsilon <= 1):
            raise ValueError(
                f"density {density:g} and epsilon {epsilon:g}: their difference has to be above 0"
                " and their sum at most 1"
            )

    def mask(self, change: Tensor, generator: torch.Generator) -> Tensor:
        density, epsilon = self.given["density"], self.given["epsilon"]
        if density == 1.0:
            return torch.ones_like(change)
        chances = by_rank(change, density, epsilon)
        return at_random(change, chances, generator) / chances
