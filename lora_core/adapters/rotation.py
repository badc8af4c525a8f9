"""What OFT and BOFT share: rotations of a layer's outputs, block by block, in one or more stages.

    W' = g ∘ S_m ... S_1 W,   each S a rotation of N blocks of B rows

Since a rotation of the weight's rows is one of the layer's outputs, W takes no part in training:
y = g ∘ S_m ... S_1 (W x) + bias. All is computed as a difference from the identity, so that small
rotations keep their digits in bf16 too. Letters: N blocks of B · B, M stages; others as in base.py.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .base import Adapter
from .create_options import CreateOptions
from .fitting import Shape, alpha_of, fitted
from .layer import Layer
from .low_rank import as_rows


class Rotation(Adapter):
    """Tensors as LyCORIS writes them: `oft_blocks`, `rescale` (O, 1, ...), which is g, and alpha.

    Alpha is no scale here but a limit: ‖Q‖ of all blocks together is at most alpha · O, if alpha is
    above 0 (LyCORIS functional/diag_oft.py `get_r`; the host leaves out the O). `rank` is B.
    """

    forms: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"oft_blocks"}),)
    optional: ClassVar = frozenset({"rescale"})
    alpha_scales: ClassVar[bool] = False

    def __init__(self, blocks: Tensor, rescale: Tensor | None, alpha: float, shape: Shape) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.rank = blocks.shape[-1]
        self.alpha = float(alpha)
        self.blocks = nn.Parameter(blocks)
        self.rescale = None if rescale is None else nn.Parameter(rescale)

    @abc.abstractmethod
    def stages(self) -> Tensor:
        """S - 1 of each stage's blocks, (M, N, B, B), in float32 or better."""

    @property
    def is_butterfly(self) -> bool:
        """Whether the rows of a stage's blocks lie apart, the further the later the stage."""
        return False

    @classmethod
    @abc.abstractmethod
    def misfit(cls, blocks: Shape, out: int) -> str:
        """What is wrong with blocks of this shape for O outputs; "" if nothing is."""

    @classmethod
    def start(cls, blocks: Shape, shape: Shape, options: CreateOptions) -> Any:
        """The adapter with blocks of zeros, which rotate by nothing. Alpha is the option's."""
        rescale = torch.ones(_column(shape)) if options.rescale else None
        return cls(torch.zeros(blocks), rescale, options.constraint, shape)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: Shape) -> Any:
        """See `Adapter.from_tensors`. No alpha means no limit."""
        wanted: dict[str, Shape] = {"oft_blocks": ()}
        problems = []
        if "oft_blocks" in tensors:
            wanted["oft_blocks"] = tuple(tensors["oft_blocks"].shape)
            problems = [text for text in (cls.misfit(wanted["oft_blocks"], shape[0]),) if text]
        if "rescale" in tensors:
            wanted["rescale"] = _column(shape)
        found = fitted(tensors, wanted, problems)
        return cls(found["oft_blocks"], found.get("rescale"), alpha_of(tensors, 0), shape)

    def tensors(self) -> dict[str, Tensor]:
        named = {"oft_blocks": self.blocks.detach()}
        if self.rescale is not None:
            named["rescale"] = self.rescale.detach()
        return {**named, "alpha": torch.tensor(self.alpha, dtype=torch.float32)}

    @property
    def needs_all_rows(self) -> bool:
        return self.rescale is not None

    @property
    def limit(self) -> float:
        """The largest ‖Q‖; 0 for none."""
        return self.alpha * self.shape[0]

    @property
    def needs_weight(self) -> bool:
        return True

    @property
    def acts_on_output(self) -> bool:
        return True

    def delta(self, weight: Tensor) -> Tensor:
        stages = self.stages()
        rows = weight.to(stages.dtype).flatten(1)[None]  # (1, O, I · prod(K))
        change = rotate(rows, stages, self._gain(), self.is_butterfly)
        return change.reshape(weight.shape).to(weight.dtype)

    def forward(self, x: Tensor, base_out: Tensor, layer: Layer) -> Tensor:
        stages, gain, bias = self.stages(), self._gain(), layer.bias()
        return RotateOutput.apply(base_out, stages, gain, bias, layer, self.is_butterfly)

    def _gain(self) -> Tensor | None:
        return None if self.rescale is None else self.rescale.flatten()


def cayley(blocks: Tensor, limit: float) -> Tensor:
    """R - 1 = 2 (1 - Q)⁻¹ Q, where R = (1 + Q)(1 - Q)⁻¹ and Q = A - Aᵀ of each block A.

    R is a rotation for any A, zero giving exactly none. Where ‖Q‖ of all blocks together is above
    a `limit` > 0, Q is scaled to it. (..., B, B), in float32 or better.
    """
    blocks = blocks if blocks.dtype == torch.float64 else blocks.float()
    skew = blocks - blocks.mT
    if limit > 0:
        norm = torch.linalg.vector_norm(skew) + 1e-8
        skew = skew * (limit / norm).clamp(max=1.0)
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    # 1 - Q has no eigenvalue below 1, so there is nothing to check, nor to wait for on a GPU.
    return torch.linalg.solve_ex(eye - skew, 2.0 * skew)[0]


def rotate(rows: Tensor, stages: Tensor, gain: Tensor | None, is_butterfly: bool) -> Tensor:
    """g ∘ S_m ... S_1 rows - rows, for rows (T, O) or (T, O, S), in their dtype.

    The change is carried apart from what it changes: their sum has no digits left for it in bf16.
    """
    change: Tensor | None = None
    half = stages.shape[-1] // 2 if is_butterfly else 0
    for number, stage in enumerate(stages.to(rows.dtype)):
        turned = rows if change is None else rows + change
        apart = 2**number * half
        step = _swap(_turn(_swap(turned, 2, apart), stage), apart, 2)
        change = step if change is None else change + step
    assert change is not None
    if gain is None:
        return change
    gain = gain.view(-1, *[1] * (rows.ndim - 2))
    return (gain - 1.0).to(rows.dtype) * rows + gain.to(rows.dtype) * change


def _swap(rows: Tensor, outer: int, inner: int) -> Tensor:
    """Axis 1 as (..., outer, inner) with these two swapped; unchanged if one of them is 0."""
    if not outer or not inner:
        return rows
    return rows.unflatten(1, (-1, outer, inner)).transpose(2, 3).flatten(1, 3)


def _turn(rows: Tensor, stage: Tensor) -> Tensor:
    """The blocks (N, B, B) on axis 1 of (T, O) or (T, O, S)."""
    blocks = rows.unflatten(1, stage.shape[:2])
    if rows.ndim > 2:
        return torch.matmul(stage, blocks).flatten(1, 2)
    return torch.bmm(blocks.transpose(0, 1), stage.mT).transpose(0, 1).flatten(1)


class RotateOutput(torch.autograd.Function):
    """base_out plus the change that `rotate` makes of base_out - bias.

    Saves base_out alone, not what each stage makes of it: that is computed again backwards.
    """

    @staticmethod
    def forward(
        ctx: Any,
        base_out: Tensor,
        stages: Tensor,
        gain: Tensor | None,
        bias: Tensor | None,
        layer: Layer,
        is_butterfly: bool,
    ) -> Tensor:
        ctx.save_for_backward(base_out, stages, gain, bias)
        ctx.layer, ctx.is_butterfly = layer, is_butterfly
        return base_out + _output_change(base_out, stages, gain, bias, layer, is_butterfly)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        base_out, stages, gain, bias = ctx.saved_tensors
        wanted = [
            None if tensor is None else tensor.detach().requires_grad_(needed)
            for tensor, needed in zip((base_out, stages, gain), ctx.needs_input_grad, strict=False)
        ]
        with torch.enable_grad():
            out, turns, factor = wanted
            assert out is not None and turns is not None
            change = _output_change(out, turns, factor, bias, ctx.layer, ctx.is_butterfly)
        leaves = [tensor for tensor in wanted if tensor is not None and tensor.requires_grad]
        found = iter(torch.autograd.grad(change, leaves, grad))
        grads = [
            next(found) if tensor is not None and tensor.requires_grad else None
            for tensor in wanted
        ]
        if grads[0] is not None:
            grads[0] = grads[0] + grad
        return *grads, None, None, None


def _output_change(
    base_out: Tensor,
    stages: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    layer: Layer,
    is_butterfly: bool,
) -> Tensor:
    pure = base_out if bias is None else base_out - layer.along_channels(bias, base_out)
    rows = as_rows(pure) if layer.is_linear else pure.flatten(2)
    return rotate(rows, stages, gain, is_butterfly).reshape(base_out.shape)


def divisors(size: int) -> list[int]:
    """The divisors of `size` above 1, the smallest first."""
    small = [number for number in range(1, math.isqrt(size) + 1) if size % number == 0]
    return sorted({*small, *(size // number for number in small)} - {1})


def nearest(sizes: list[int], rank: int) -> int:
    """The largest of the sizes that is at most `rank`, or the smallest of all."""
    return max((size for size in sizes if size <= rank), default=min(sizes))


def check(shape: Shape, rank: int) -> None:
    """Raises ValueError for a rank < 1 and for a layer with one output, which can't rotate."""
    problems = [] if rank > 0 else [f"rank is {rank}; a block needs at least 1"]
    if shape[0] < 2:
        problems.append(f"the layer has {shape[0]} output; a rotation needs at least 2")
    if problems:
        raise ValueError("; ".join(problems))


def _column(shape: Shape) -> Shape:
    return (shape[0], *[1] * (len(shape) - 1))
