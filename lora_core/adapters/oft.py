"""OFT: a rotation of the layer's outputs in blocks, which keeps the angles between neurons.

    W' = Rᵀ W,   R = (1 + Q)(1 - Q)⁻¹ of each block,   Q = A - Aᵀ

https://arxiv.org/abs/2306.07280 (section 3.3, equation 5), as LyCORIS' diag-oft stores and turns it
(functional/diag_oft.py: its einsum takes R by the other index, hence the transpose).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Axes
from .create_options import DEFAULT, CreateOptions
from .fitting import Shape
from .oft_input import InputOFT
from .rotation import Rotation, cayley, check, divisors, nearest


class OFT(Rotation):
    """`oft_blocks` (N, B, B) with N · B = O; the rest as in `Rotation`.

    In full W' = g ∘ Rᵀ W, g being `rescale` where there is one, so ΔW = (g ∘ Rᵀ - 1) W. PEFT's form
    of the type, which rotates inputs, is an `InputOFT`.
    """

    name: ClassVar[str] = "oft"
    help: ClassVar[str] = "rotates outputs in blocks; keeps more of what the model knows."
    forms: ClassVar[tuple[frozenset[str], ...]] = (*Rotation.forms, *InputOFT.forms)
    optional: ClassVar = Rotation.optional | InputOFT.optional

    @classmethod
    def accepts(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """BOFT's blocks have one axis more."""
        return super().accepts(shapes) and len(shapes.get("oft_blocks", ())) != 4

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: Shape) -> Any:
        """See `Adapter.from_tensors`."""
        if InputOFT.names() & tensors.keys():
            return InputOFT.from_tensors(tensors, shape)
        return super().from_tensors(tensors, shape)

    @classmethod
    def create(
        cls,
        shape: Shape,
        rank: int,
        alpha: float,
        *,
        options: CreateOptions = DEFAULT,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Zeros. B is the largest divisor of O that is at most `rank`, or its smallest above 1.

        `options.on_input` makes an `InputOFT`.

        Alpha does not count, being no scale here: the limit is `options.constraint`. Raises
        ValueError for rank < 1 and a layer with one output.
        """
        if options.on_input:
            return InputOFT.create(shape, rank, alpha)
        check(shape, rank)
        size = nearest(divisors(shape[0]), rank)
        return cls.start((shape[0] // size, size, size), shape, options)

    @classmethod
    def misfit(cls, blocks: Shape, out: int) -> str:
        fits = len(blocks) == 3 and blocks[1] == blocks[2] and blocks[0] * blocks[1] == out
        return "" if fits else f"oft_blocks is {blocks}, expected (N, B, B) with N · B = {out}"

    def row_axes(self) -> Axes | None:
        """None with a limit, which is one of all blocks together."""
        axes = {"oft_blocks": (0, self.rank)}
        if self.rescale is not None:
            axes["rescale"] = (0, 1)
        return axes if self.limit <= 0 else None

    def stages(self) -> Tensor:
        return cayley(self.blocks.mT, self.limit)[None]
