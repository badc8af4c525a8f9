"""Weights of a stack: what is typed, blended by a rule, and times a master strength.

Letters: s the strengths typed, n the norms of the ΔWs, N how many are blended.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

RULES = {
    "off": "strengths as they are typed.",
    "sum to 1": "parts of one whole.",
    "max to 1": "the strongest at 1.",
    "rms to 1": "an even stack at 1 each.",
    "equal energy": "each LoRA's change brought to the same norm, then as typed.",
}
EQUAL_ENERGY = "equal energy"


def blend(
    strengths: Sequence[float],
    rule: str,
    master: float = 1.0,
    norms: Sequence[float] | None = None,
) -> list[float]:
    """The effective strengths of one model's part of a stack: master times

    off: s; sum to 1: s / Σ|s|; max to 1: s / max|s|; rms to 1: s / √(mean s²);
    equal energy: s · m / n with m = √(mean n²) over the norms n, of the ΔWs at strength 1, that
    are not 0, so that N orthogonal changes keep their energy as a whole.

    Strengths that are all 0 stay so. Raises ValueError for an unknown rule or missing norms.
    """
    if rule not in RULES:
        raise ValueError(f"unknown weight blending {rule!r}; known: {', '.join(RULES)}")
    if rule == EQUAL_ENERGY:
        return [master * s for s in _equal_energy(strengths, norms)]
    sizes = [abs(s) for s in strengths]
    scale = {
        "off": 1.0,
        "sum to 1": sum(sizes),
        "max to 1": max(sizes, default=0.0),
        "rms to 1": math.sqrt(sum(size**2 for size in sizes) / max(len(sizes), 1)),
    }[rule]
    return [master * (s / scale if scale else s) for s in strengths]


def shares(strengths: Sequence[float]) -> list[float]:
    """Each one's part of sum|s|; zeros where all are 0."""
    whole = sum(abs(s) for s in strengths)
    return [abs(s) / whole if whole else 0.0 for s in strengths]


def _equal_energy(strengths: Sequence[float], norms: Sequence[float] | None) -> list[float]:
    if norms is None or len(norms) != len(strengths):
        raise ValueError("equal energy needs the norm of each LoRA's change")
    changing = [norm for norm in norms if norm > 0]
    if not changing:
        return list(strengths)
    mean = math.sqrt(sum(norm**2 for norm in changing) / len(changing))
    return [s * mean / norm if norm > 0 else s for s, norm in zip(strengths, norms, strict=True)]
