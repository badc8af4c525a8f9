"""Elements of a change that are left out before changes are combined: masks as numbers 0 or 1.

Letters: M elements of a change, k of them kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = 1 << 16


def kth_largest(sizes: Tensor, count: int) -> Tensor:
    """The `count`-th largest of non-negative float32 numbers, exactly, without sorting them.

    Such numbers are in the order of their bits; counting the upper halves of those, then the lower
    halves in one bucket, takes two passes.
    """
    bits = sizes.flatten().view(torch.int32)
    upper = torch.bincount(bits >> 16, minlength=_HALF // 2)
    above = upper.flip(0).cumsum(0).flip(0)  # how many are in a bucket or above it
    bucket = int((above >= count).sum()) - 1
    rest = count - int(above[bucket] - upper[bucket])
    lower = torch.bincount(bits[(bits >> 16) == bucket] & (_HALF - 1), minlength=_HALF)
    at_least = lower.flip(0).cumsum(0).flip(0)
    low = int((at_least >= rest).sum()) - 1
    found = torch.tensor(bucket * _HALF + low, dtype=torch.int32, device=sizes.device)
    return found.view(torch.float32)


def largest(change: Tensor, density: float) -> Tensor:
    """1 at the k = density · M elements of the largest size, 0 elsewhere; those alike at the
    border are all kept."""
    count = int(density * change.numel())
    if count >= change.numel():
        return torch.ones_like(change)
    if count < 1:
        return torch.zeros_like(change)
    sizes = change.abs().contiguous()
    return (sizes >= kth_largest(sizes, count)).to(change.dtype)


def between(change: Tensor, density: float, gamma: float) -> Tensor:
    """`largest` without the gamma · M largest of all (Breadcrumbs); k stays density · M where that
    many are left."""
    total = change.numel()
    outliers = min(int(gamma * total), total - int(density * total))
    sizes = change.abs().contiguous()
    kept = largest(change, (int(density * total) + outliers) / total)
    if outliers < 1:
        return kept
    return kept * (sizes < kth_largest(sizes, outliers)).to(change.dtype)


def at_random(change: Tensor, density: float | Tensor, generator: torch.Generator) -> Tensor:
    """1 with a probability of `density`, one number or one for each element."""
    numbers = torch.rand(change.shape, generator=generator)  # the same on every device
    return (numbers.to(change.device) < density).to(change.dtype)


def by_rank(change: Tensor, density: float, epsilon: float) -> Tensor:
    """Chances from density - epsilon for the smallest element of a row to density + epsilon for
    its largest, in even steps by rank (DELLA's MagPrune)."""
    rows = change.reshape(len(change), -1) if change.ndim > 1 else change[None]
    ranks = rows.abs().argsort(1).argsort(1).to(change.dtype)
    places = ranks / max(rows.shape[1] - 1, 1)
    return (density - epsilon + 2.0 * epsilon * places).reshape(change.shape)
