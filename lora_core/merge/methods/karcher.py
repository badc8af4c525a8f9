"""The mean of directions on the sphere: SLERP for any number of changes.

    u = argmin Σ α_i θ(u, u_i)²,   D = (Σ α_i n_i) · u

u_i = v_i / n_i being the directions of v_i = ΔW_i (turned round where s_i is negative), n_i their
norms and α_i = |s_i| / Σ|s|. By steps along the sphere's tangent, as mergekit's karcher.py; all of
them need inner products only. Karcher, https://doi.org/10.1002/cpa.3160300502.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import FactoredMethod

STEPS = 100
TOLERANCE = 1e-9


class Karcher(FactoredMethod):
    name = "Karcher mean"
    help = "the mean of the directions on the sphere; strengths are shares."

    def coefficients(self, gram: Tensor, strengths: Sequence[float]) -> list[float]:
        typed = torch.tensor(strengths, dtype=torch.float64)
        norms = gram.diagonal().clamp(min=0).sqrt()
        is_known = (norms > TOLERANCE * norms.max()) & (typed != 0)
        if not is_known.any():
            return [0.0] * len(strengths)
        shares = typed.abs() / typed.abs().sum()
        signs, sizes = typed.sign()[is_known], norms[is_known]
        cosines = gram[is_known][:, is_known] * signs[:, None] * signs / (sizes[:, None] * sizes)
        mean = mean_direction(cosines, shares[is_known] / shares[is_known].sum())
        found = torch.zeros_like(typed)
        found[is_known] = (shares * norms).sum() * mean * signs / sizes
        return found.tolist()


def mean_direction(cosines: Tensor, shares: Tensor) -> Tensor:
    """(N,) coefficients of the unit vectors, (N, N) their cosines, for their mean on the sphere."""

    def length(of: Tensor) -> Tensor:
        return (of @ cosines @ of).clamp(min=0).sqrt()

    mean = shares / length(shares) if length(shares) > TOLERANCE else first(len(shares))
    for _ in range(STEPS):
        nearness = (cosines @ mean).clamp(-1.0, 1.0)
        angles = torch.acos(nearness)
        stretch = torch.where(angles < TOLERANCE, 0.0, angles / angles.sin().clamp(min=1e-30))
        pulls = shares * stretch
        step = pulls - (pulls * nearness).sum() * mean  # along the tangent at the mean
        size = length(step)
        if size < TOLERANCE:
            break
        mean = size.cos() * mean + size.sin() * step / size
        mean = mean / length(mean)
    return mean


def first(count: int) -> Tensor:
    """Where the vectors' mean is zero and so no direction, mergekit begins at the first."""
    return torch.eye(count, dtype=torch.float64)[0]
