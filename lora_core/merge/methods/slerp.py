"""Between two changes along an arc, so that the way from one to the other loses no length.

    D = (sin((1 - t) θ) v_1 + sin(t θ) v_2) / sin θ,   θ the angle between them

with t = |s_2| / (|s_1| + |s_2|) and v_i = ΔW_i, turned round where s_i is negative: the strengths
are shares. Shoemake, "Animating rotation with quaternion curves" (SIGGRAPH 1985).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from .base import FactoredMethod


class Slerp(FactoredMethod):
    """Of changes as long as they are; straight where they point nearly alike or opposite.

    As mergekit's slerp.py: the line from |cos θ| > 0.9995 on.
    """

    name = "SLERP"
    help = "two LoRAs along an arc between them; strengths are shares."
    most = 2
    line_from = 0.9995

    def coefficients(self, gram: Tensor, strengths: Sequence[float]) -> list[float]:
        sizes = [abs(strength) for strength in strengths]
        signs = [math.copysign(1.0, strength) for strength in strengths]
        if len(strengths) == 1 or not sum(sizes):
            return [sign * (size > 0) for sign, size in zip(signs, sizes, strict=True)]
        share = sizes[1] / sum(sizes)
        norms = gram.diagonal().clamp(min=0).sqrt()
        whole = float(norms.prod())
        cosine = signs[0] * signs[1] * float(gram[0, 1]) / whole if whole else 1.0
        one, other = self.between(min(1.0, max(-1.0, cosine)), share)
        return [one * signs[0], other * signs[1]]

    def between(self, cosine: float, share: float) -> tuple[float, float]:
        """The coefficients of v_1 and v_2."""
        angle = math.acos(cosine)
        if abs(cosine) > self.line_from or not math.sin(angle):
            return 1.0 - share, share
        return (
            math.sin((1.0 - share) * angle) / math.sin(angle),
            math.sin(share * angle) / math.sin(angle),
        )


class NuSlerp(Slerp):
    """The same along the arc as far as numbers go: the line only where sin θ < 1e-8.

    As mergekit's nuslerp.py with `nuslerp_flatten`.
    """

    name = "NuSLERP"
    help = "SLERP that stays on the arc also where two LoRAs are nearly alike."
    line_from = math.sqrt(1.0 - 1e-16)
