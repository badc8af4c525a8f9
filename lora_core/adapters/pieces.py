"""Adapters of some rows of a fused layer each, such as q and k of q/k/v, as one of the whole layer.

    ΔW = Σ over the pieces of E · ΔW_piece(Eᵀ W),   E placing a piece's rows where they are

A piece sees its own rows of W alone, as in the separate layer that it was trained on. Rows that no
piece has stay unchanged. It holds no more numbers than its pieces do. Letters as in base.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from . import UNREGISTERED, adapter_type
from .add_change import factors_are_smaller
from .base import Adapter
from .create_options import DEFAULT, CreateOptions
from .fitting import Shape
from .layer import Layer


class Pieces(Adapter):
    """`members` are {first row: the adapter of the rows from there}, in their order, apart.

    No file holds it: each piece is written under the name of its rows. Not offered for training,
    so not registered, but trained further where a LoRA to start from has it.
    """

    name: ClassVar[str] = "pieces"
    help: ClassVar[str] = "adapters of some rows each."
    forms: ClassVar = ()
    has_alpha: ClassVar[bool] = False

    def __init__(self, members: Mapping[int, Adapter], shape: Shape) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.by_row = nn.ModuleList(members[start] for start in sorted(members))
        self.rank = sum(part.rank for part in self.members())
        self.alpha = float(self.rank)
        stops = [start + members[start].shape[0] for start in sorted(members)]
        self.places = [slice(*rows) for rows in zip(sorted(members), stops, strict=True)]
        self._facts: tuple[Layer, list[Layer]] | None = None  # the pieces' of the last layer

    @classmethod
    def create(
        cls,
        shape: Shape,
        rank: int,
        alpha: float,
        *,
        options: CreateOptions = DEFAULT,
        generator: torch.Generator | None = None,
    ) -> Pieces:
        """ValueError: what rows there are is told by a file alone."""
        raise ValueError("pieces of a layer come from files only")

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], shape: Shape) -> Pieces:
        """See `Adapter.from_tensors`; named as `tensors` names them."""
        named: dict[tuple[int, int, str], dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            rows, kind, name = key.split(".", 2)
            start, stop = map(int, rows.split(":"))
            named.setdefault((start, stop, kind), {})[name] = tensor
        return cls(
            {
                start: (UNREGISTERED.get(kind) or adapter_type(kind)).from_tensors(
                    own, (stop - start, *shape[1:])
                )
                for (start, stop, kind), own in named.items()
            },
            shape,
        )

    def tensors(self) -> dict[str, Tensor]:
        """{"<first row>:<row after the last>.<type>.<name in files>": tensor}."""
        return {
            f"{place.start}:{place.stop}.{part.name}.{name}": tensor
            for place, part in self.placed()
            for name, tensor in part.tensors().items()
        }

    def members(self) -> Sequence[Adapter]:
        return [part for part in self.by_row if isinstance(part, Adapter)]

    def placed(self) -> list[tuple[slice, Adapter]]:
        """(its rows, the piece), in their order."""
        return list(zip(self.places, self.members(), strict=True))

    @property
    def needs_weight(self) -> bool:
        return any(part.needs_weight for part in self.members())

    @property
    def acts_on_output(self) -> bool:
        return all(part.acts_on_output for part in self.members())

    @property
    def rank_mask(self) -> Tensor | None:
        """(R,), the pieces' one after the other."""
        masks = [part.rank_mask for part in self.members() if part.rank_mask is not None]
        return torch.cat(masks) if masks else None

    @rank_mask.setter
    def rank_mask(self, mask: Tensor | None) -> None:
        ranks = [part.rank for part in self.members()]
        masks = [None] * len(ranks) if mask is None else mask.split(ranks)
        for part, own in zip(self.members(), masks, strict=True):
            part.rank_mask = own

    def last_factors(self) -> list[nn.Parameter]:
        return [factor for part in self.members() for factor in part.last_factors()]

    def delta(self, weight: Tensor) -> Tensor:
        change = next(self.parameters()).new_zeros(self.shape)
        for place, part in self.placed():
            change[place] = part.delta(weight[place])
        return change

    @property
    def factored_rank(self) -> int | None:
        """Together the pieces' own; None, too, where ΔW is smaller than its factors would be."""
        ranks = [part.factored_rank for part in self.members()]
        known = [rank for rank in ranks if rank is not None]
        whole = len(known) == len(ranks) and factors_are_smaller(sum(known), self.shape)
        return sum(known) if whole else None

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """U (O, R) has each piece's rows in columns of their own, V (R, I·K) all pieces' below
        each other.
        """
        if self.factored_rank is None:
            return None
        ups, downs = [], []
        for place, part in self.placed():
            scale, up, down = part.scaled_factors()
            ups.append(pad(scale * up, (0, 0, place.start, self.shape[0] - place.stop)))
            downs.append(down)
        return torch.cat(ups, 1), torch.cat(downs)

    def forward(self, x: Tensor, base_out: Tensor, layer: Layer) -> Tensor:
        """Each piece's `forward` on a copy of its rows of the output, between those that stay.

        Views would share one version: of two pieces that write, the first's backward would refuse.
        """
        axis = base_out.ndim - 1 if layer.is_linear else 1
        outs, end = [], 0
        for (place, part), facts in zip(self.placed(), self._layers(layer), strict=True):
            own = base_out.narrow(axis, place.start, place.stop - place.start).clone()
            outs += [base_out.narrow(axis, end, place.start - end), part(x, own, facts)]
            end = place.stop
        outs.append(base_out.narrow(axis, end, self.shape[0] - end))
        return torch.cat(outs, axis)

    def _layers(self, layer: Layer) -> list[Layer]:
        """The same ones for the same layer, by which the pieces know what they have built."""
        if self._facts is None or self._facts[0] is not layer:
            self._facts = layer, [_rows_of(layer, place) for place in self.places]
        return self._facts[1]


def _rows_of(layer: Layer, place: slice) -> Layer:
    """Facts of some rows of a layer."""

    def bias() -> Tensor | None:
        found = layer.bias()
        return None if found is None else found[place]

    return replace(
        layer,
        shape=(place.stop - place.start, *layer.shape[1:]),
        weight=lambda: layer.weight()[place],
        bias=bias,
    )
