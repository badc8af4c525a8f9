"""The best approximation of a change by few directions: its truncated singular value decomposition.

    D ≈ up · down = (U √S) (√S Vᵀ),   U, S, V the first of D's

which no other matrix of that rank comes nearer to (Eckart and Young). With √S on both sides,
factors in float16 keep the small directions. Nothing is clamped. Letters: O out, I in (kernel
included), R the rank at hand, K the rank kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .rank_rule import RankRule

MAX_SKETCH = 64  # ranks up to this are sought by a random sketch, larger ones by the Gram matrix,
MIN_SIDE = 512  # and so are all of a matrix that is not larger, where that is as quick


@dataclass(frozen=True)
class Truncated:
    """up (O, K), down (K, I), and the share of the change's norm that they hold."""

    up: Tensor
    down: Tensor
    kept: float


def of_factors(up: Tensor, down: Tensor, rule: RankRule) -> Truncated:
    """Of D = up @ down, (O, R) and (R, I), without D: exact.

    up = Q₁ R₁, downᵀ = Q₂ R₂, and R₁ R₂ᵀ is at most (R, R): its decomposition is D's between Q₁ and
    Q₂. (O + I) R² multiplications where D's takes O I min(O, I).
    """
    left_basis, left_core = torch.linalg.qr(up)
    right_basis, right_core = torch.linalg.qr(down.t())
    left, sizes, right = torch.linalg.svd(left_core @ right_core.t(), full_matrices=False)
    rank = rule.choose(sizes)
    roots = sizes[:rank].sqrt()
    return Truncated(
        left_basis @ (left[:, :rank] * roots),
        (roots[:, None] * right[:rank]) @ right_basis.t(),
        _share(sizes[:rank], sizes),
    )


def of_kronecker(first: Tensor, second: Tensor, rule: RankRule) -> Truncated:
    """Of D = first ⊗ second, two matrices, without D: exact.

    Its singular values are all products of theirs, its vectors the Kronecker products of theirs.
    """
    left1, sizes1, right1 = torch.linalg.svd(first, full_matrices=False)
    left2, sizes2, right2 = torch.linalg.svd(second, full_matrices=False)
    sizes, places = (sizes1[:, None] * sizes2).flatten().sort(descending=True)
    rank = rule.choose(sizes)
    ones, twos = places[:rank] // len(sizes2), places[:rank] % len(sizes2)
    roots = sizes[:rank].sqrt()
    up = (left1[:, None, ones] * left2[None, :, twos]).flatten(0, 1) * roots
    down = (right1[ones][:, :, None] * right2[twos][:, None, :]).flatten(1) * roots[:, None]
    return Truncated(up, down, _share(sizes[:rank], sizes))


def of_dense(change: Tensor, rule: RankRule) -> Truncated:
    """Of D (O, I) itself.

    Few directions by a seeded sketch of twice as many with four power iterations (torch's
    svd_lowrank, Halko et al., https://arxiv.org/abs/0909.4061), at most 0.003 % from the best; all
    others by the eigenvectors of the Gram matrix of the short side, in float64.
    """
    most = rule.most
    if rule.kind == "rank" and most and most <= MAX_SKETCH and min(change.shape) > MIN_SIDE:
        return _by_sketch(change, rule, most)
    if change.shape[0] > change.shape[1]:
        turned = of_dense(change.t(), rule)
        return Truncated(turned.down.t(), turned.up.t(), turned.kept)
    wide = change.double()
    squares, vectors = torch.linalg.eigh(wide @ wide.t())
    sizes = squares.flip(0).clamp(min=0).sqrt()
    rank = rule.choose(sizes)
    left = vectors.flip(1)[:, :rank]
    roots = sizes[:rank].clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    down = (left.t() @ wide) / roots[:, None]
    kept = _share(sizes[:rank], sizes)
    return Truncated((left * roots).to(change.dtype), down.to(change.dtype), kept)


def _by_sketch(change: Tensor, rule: RankRule, most: int) -> Truncated:
    devices = [change.device] if change.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        left, sizes, right = torch.svd_lowrank(change, q=2 * most, niter=4)
    rank = rule.choose(sizes)
    roots = sizes[:rank].sqrt()
    whole = torch.linalg.vector_norm(change, dtype=torch.float64)
    kept = float(torch.linalg.vector_norm(sizes[:rank].double()) / whole) if whole else 1.0
    return Truncated(left[:, :rank] * roots, (right[:, :rank] * roots).t(), min(kept, 1.0))


def _share(kept: Tensor, sizes: Tensor) -> float:
    """Of the norm; 1 of nothing."""
    whole = torch.linalg.vector_norm(sizes.double())
    return float(torch.linalg.vector_norm(kept.double()) / whole) if whole else 1.0
