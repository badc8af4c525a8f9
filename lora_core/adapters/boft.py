"""BOFT: a rotation of the layer's outputs in stages of blocks, as in a butterfly network.

    W' = R_m ... R_1 W,   R = (1 + Q)(1 - Q)⁻¹ of each block,   Q = A - Aᵀ

https://arxiv.org/abs/2311.06243 (section 4, equation 3), as LyCORIS stores it (functional/boft.py).
The blocks of stage i = 1, 2, ... have rows that lie 2^(i - 1) · B / 2 apart: N = 2^p blocks and
p + 1 stages bring every output together with every other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from .create_options import DEFAULT, CreateOptions
from .fitting import Shape
from .rotation import Rotation, cayley, check, divisors, nearest


class BOFT(Rotation):
    """`oft_blocks` (M, N, B, B) with N · B = O, an even B, and N a multiple of 2^(M - 1); the rest
    as in `Rotation`.

    With an odd O there is no butterfly: M = 1 and odd blocks of neighbours, as OFT's. No other
    program reads those.
    """

    name: ClassVar[str] = "boft"
    help: ClassVar[str] = "OFT in several stages: every output turns with every other; slower."

    @classmethod
    def accepts(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """OFT's blocks have one axis less."""
        return super().accepts(shapes) and len(shapes["oft_blocks"]) == 4

    @classmethod
    def create(
        cls,
        shape: Shape,
        rank: int,
        alpha: float,
        *,
        options: CreateOptions = DEFAULT,
        generator: torch.Generator | None = None,
    ) -> BOFT:
        """Zeros. B is the largest even number up to `rank` for which N = O / B is a power of two,
        or the smallest there is, and M = log2(N) + 1 (LyCORIS `power2factorization`).

        Alpha does not count, being no scale here: the limit is `options.constraint`. Raises
        ValueError for rank < 1 and a layer with one output.
        """
        check(shape, rank)
        out = shape[0]
        if out % 2:
            size = nearest(divisors(out), rank)
            blocks: Shape = (1, out // size, size, size)
        else:
            sizes = [
                size for size in divisors(out) if size % 2 == 0 and _is_power_of_2(out // size)
            ]
            size = nearest(sizes, rank)
            blocks = ((out // size).bit_length(), out // size, size, size)
        made: BOFT = cls.start(blocks, shape, options)
        return made

    @classmethod
    def misfit(cls, blocks: Shape, out: int) -> str:
        if len(blocks) == 4 and blocks[2] == blocks[3] and blocks[1] * blocks[2] == out:
            stages, count, size, _ = blocks
            if size % 2 == 0 and stages > 0 and count % 2 ** (stages - 1) == 0:
                return ""
            if stages == 1 and out % 2:
                return ""
        return (
            f"oft_blocks is {blocks}, expected (M, N, B, B) with N · B = {out}, an even B, and N a"
            " multiple of 2^(M - 1)"
        )

    @property
    def is_butterfly(self) -> bool:
        return self.rank % 2 == 0

    def stages(self) -> Tensor:
        return cayley(self.blocks, self.limit)


def _is_power_of_2(number: int) -> bool:
    return number & (number - 1) == 0
