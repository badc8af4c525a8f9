"""(IA)³: a factor for each output of a layer, or for each input.

    W' = (1 + w) ∘ W,   along the rows, or along the columns if `on_input`

https://arxiv.org/abs/2205.05638 (section 3.3), as LyCORIS stores it: the paper's and PEFT's factor
is 1 + w. Letters as in base.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from .add_change import add_dense
from .base import Adapter, Axes, Built
from .create_options import DEFAULT, CreateOptions
from .dora import ScaleOutput
from .fitting import Shape
from .layer import Layer

PEFT_FACTOR = "ia3_l"


class IA3(Adapter):
    """ΔW = w ∘ W. Tensors: `weight`, which is w, (C,) or for a convolution (1, C, 1, ...), with C
    the outputs or the inputs, and `on_input`, 0 or 1, which says which of the two. PEFT's
    `ia3_l` is 1 + w: (O, 1) or (1, I), or (1, C, 1, ...), whose side C tells or `on_input`.

    It has neither rank nor alpha; both are 1.
    """

    name: ClassVar[str] = "ia3"
    help: ClassVar[str] = "one factor for each output: tiny files that learn little."
    forms: ClassVar = (frozenset({"weight", "on_input"}), frozenset({PEFT_FACTOR}))
    has_alpha: ClassVar[bool] = False

    def __init__(self, weight: Tensor, on_input: bool, shape: Shape) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.rank, self.alpha = 1, 1.0
        self.on_input = on_input
        self.weight = nn.Parameter(weight)

    @classmethod
    def create(
        cls,
        shape: Shape,
        rank: int,
        alpha: float,
        *,
        options: CreateOptions = DEFAULT,
        generator: torch.Generator | None = None,
    ) -> IA3:
        """w = 0, on the outputs unless `options.on_input`. Rank and alpha have no meaning here;
        raises ValueError for a rank < 1 all the same.
        """
        if rank < 1:
            raise ValueError(f"rank is {rank}; at least 1 is needed, though ia3 does not use it")
        weight = torch.zeros(_size(shape, options.on_input), dtype=torch.float32)
        return cls(weight, options.on_input, shape)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: Shape) -> IA3:
        """See `Adapter.from_tensors`. w may have its axes of size 1 or lack them."""
        if PEFT_FACTOR in tensors:
            tensors = _from_peft(tensors, shape)
        missing = [name for name in ("weight", "on_input") if name not in tensors]
        problems = [f"{', '.join(missing)} is missing"] if missing else []
        which = tensors.get("on_input")
        known = which is not None and which.numel() == 1 and which.item() in (0, 1)
        if which is not None and not known:
            found = which.item() if which.numel() == 1 else f"of shape {tuple(which.shape)}"
            problems.append(f"on_input is {found}, expected 0 or 1")
        sides = [bool(which.item())] if known and which is not None else [False, True]
        sizes = [_size(shape, side) for side in sides]
        weight = tensors.get("weight")
        if weight is not None and not any(_holds(weight.shape, size) for size in sizes):
            expected = " or ".join(str(size) for size in sizes)
            problems.append(f"weight is {tuple(weight.shape)}, expected {expected}")
        if problems:
            raise ValueError("; ".join(problems))
        return cls(tensors["weight"].reshape(sizes[0]), sides[0], shape)

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight.detach(), "on_input": torch.tensor(int(self.on_input))}

    def row_axes(self) -> Axes:
        return {} if self.on_input else {"weight": (min(1, self.weight.ndim - 1), 1)}

    @property
    def needs_all_rows(self) -> bool:
        return self.on_input

    @property
    def needs_weight(self) -> bool:
        return True

    @property
    def acts_on_output(self) -> bool:
        return not self.on_input

    def delta(self, weight: Tensor) -> Tensor:
        ones = [1] * (weight.ndim - 2)
        return weight * self.weight.view(*((1, -1) if self.on_input else (-1, 1)), *ones)

    @torch.no_grad()
    def delta_gradients(
        self, weight: Tensor, grad: Tensor, built: Built
    ) -> tuple[Tensor | None, ...]:
        """Σ G ∘ W over all axes but that of w."""
        others = [axis for axis in range(weight.ndim) if axis != int(self.on_input)]
        return ((grad * weight).sum(others).view_as(self.weight),)

    def forward(self, x: Tensor, base_out: Tensor, layer: Layer) -> Tensor:
        """On outputs: (1 + w) ∘ (base_out - bias) + bias, which needs no product with W."""
        if self.on_input:
            return add_dense(self, x, base_out, layer)
        gain = 1.0 + self.weight.flatten()
        return ScaleOutput.apply(base_out, gain, layer.bias(), layer.is_linear)


def _from_peft(tensors: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """`weight` and `on_input` of PEFT's factor, beside which others have no place."""
    factor = tensors[PEFT_FACTOR]
    sides = [side for side in (False, True) if tuple(factor.shape) == peft_size(shape, side)]
    if "weight" in tensors:
        raise ValueError(f"weight and {PEFT_FACTOR} are both there")
    if not sides:
        expected = " or ".join(str(peft_size(shape, side)) for side in (False, True))
        raise ValueError(f"{PEFT_FACTOR} is {tuple(factor.shape)}, expected {expected}")
    told = {"on_input": tensors["on_input"]} if "on_input" in tensors else {}
    if len(sides) == 1:
        told = {"on_input": torch.tensor(int(sides[0]))}
    if not told:
        raise ValueError(
            f"{PEFT_FACTOR} is {tuple(factor.shape)}, which may be of outputs or inputs: PEFT's"
            " adapter_config.json says which, and it is not with these tensors"
        )
    return {"weight": (factor - 1.0).flatten(), **told}


def peft_size(shape: Shape, on_input: bool) -> Shape:
    """The shape of PEFT's factor for a layer of `shape` (tuners/ia3/layer.py `update_layer`)."""
    if len(shape) == 2:
        return (1, shape[1]) if on_input else (shape[0], 1)
    return _size(shape, on_input)


def _size(shape: Shape, on_input: bool) -> Shape:
    """The shape of w for a layer of `shape`."""
    channels = shape[1] if on_input else shape[0]
    return (channels,) if len(shape) == 2 else (1, channels, *[1] * (len(shape) - 2))


def _holds(found: torch.Size, expected: Shape) -> bool:
    """Whether the shapes are equal but for axes of size 1."""
    return [size for size in found if size != 1] == [size for size in expected if size != 1]
