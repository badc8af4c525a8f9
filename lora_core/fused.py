"""Changes of some rows of a fused layer, such as q of q/k/v, as one adapter of the whole layer.

    ΔW = Σ over the pieces of E · ΔW_piece,   E placing a piece's rows where they are in the layer

which is exact: a LoRA's up gets the piece's rows at their place, and the downs are stacked. Rows
that no piece has stay unchanged. Letters as in adapters/base.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adapters import Adapter
from .adapters.dora import Decomposable
from .adapters.full import Full
from .adapters.lora import LoRA
from .key_map import Slice

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """An adapter of `rows` of a layer."""

    adapter: Adapter
    rows: Slice

    @property
    def place(self) -> slice:
        _, start, length = self.rows
        return slice(start, start + length)


def piece_shape(shape: Shape, rows: Slice) -> Shape:
    """The shape of `rows` of a weight of `shape`. ValueError for other axes than the first."""
    axis, _, length = rows
    if axis != 0:
        raise ValueError(f"it is a part of the weight's axis {axis}; only rows can be joined")
    return (length, *shape[1:])


def joined(pieces: Sequence[Piece], shape: Shape) -> Adapter:
    """One adapter of a layer of `shape` with the change of all pieces.

    Pieces of LoRAs that share one down and one scale keep them both, so that a LoRA that was cut
    into pieces comes back bit for bit. Raises ValueError for rows that are there twice and for
    types that can't be joined.
    """
    pieces = sorted(pieces, key=lambda piece: piece.rows[1])
    for before, after in zip(pieces, pieces[1:], strict=False):
        if before.place.stop > after.place.start:
            raise ValueError(f"rows {after.place.start} to {before.place.stop} are there twice")
    dense = _dense(pieces, shape)
    if dense is not None:
        return dense
    lora = _shared(pieces, shape) or _stacked(pieces, shape)
    lora.magnitude = _magnitudes(pieces, shape)
    return lora


def swapped(adapter: Adapter) -> Adapter:
    """The adapter of the same layer with the two halves of its rows in the other order."""
    if _is_plain(adapter):
        ((name, tensor),) = adapter.tensors().items()
        return type(adapter).from_tensors({name: _turned(tensor)}, adapter.shape)
    lora = adapter if isinstance(adapter, LoRA) else _stacked([_whole(adapter)], adapter.shape)
    turned = LoRA(_turned(lora.up), lora.down.detach(), lora.alpha, lora.shape, _own(lora.mid))
    magnitude = adapter.magnitude if isinstance(adapter, Decomposable) else None
    if magnitude is not None:
        by_row = magnitude.shape[0] == adapter.shape[0] and magnitude.shape[1] == 1
        turned.magnitude = nn.Parameter(_turned(magnitude) if by_row else magnitude.detach())
    return turned


def cut(lora: LoRA, slices: Mapping[str, Slice]) -> dict[str, LoRA]:
    """The inverse of `joined`: {name: the LoRA of these rows}, all with the same down and alpha."""
    pieces = {}
    for name, rows in slices.items():
        place = Piece(lora, rows).place
        shape = piece_shape(lora.shape, rows)
        up = lora.up.detach()[place].clone()
        pieces[name] = LoRA(up, lora.down.detach(), lora.alpha, shape, _own(lora.mid))
        if lora.magnitude is not None:
            pieces[name].magnitude = nn.Parameter(lora.magnitude.detach()[place].clone())
    return pieces


def _is_plain(adapter: Adapter) -> bool:
    """Whether its only tensor is the change itself, as in a full or bias change."""
    tensors = list(adapter.tensors().values())
    return len(tensors) == 1 and tuple(tensors[0].shape) == tuple(adapter.shape)


def _dense(pieces: Sequence[Piece], shape: Shape) -> Adapter | None:
    """A change in full, where the pieces are that already or their factors would be larger."""
    first = pieces[0].adapter
    kind, name = type(first), next(iter(first.tensors()))
    if not all(_is_plain(piece.adapter) and type(piece.adapter) is kind for piece in pieces):
        kind, name = Full, "diff"
        ranks = [piece.adapter.factored_rank for piece in pieces]
        known = [rank for rank in ranks if rank is not None]
        smaller = sum(known) * (shape[0] + _columns(shape)) < shape[0] * _columns(shape)
        smaller |= all(isinstance(piece.adapter, LoRA) for piece in pieces)
        needs_weight = any(piece.adapter.needs_weight for piece in pieces)
        if needs_weight or (smaller and len(known) == len(ranks)):
            return None
    change = torch.zeros(shape)
    for piece in pieces:
        empty = torch.empty(()).expand(piece.adapter.shape)
        change[piece.place] = piece.adapter.delta(empty).detach()
    return kind.from_tensors({name: change}, shape)


def _shared(pieces: Sequence[Piece], shape: Shape) -> LoRA | None:
    """A LoRA with the one down and alpha that all the pieces have, or None."""
    loras = [piece.adapter for piece in pieces if isinstance(piece.adapter, LoRA)]
    first = loras[0] if loras else None
    if first is None or len(loras) < len(pieces):
        return None
    for lora in loras[1:]:
        same_mid = (lora.mid is None) == (first.mid is None)
        if lora.alpha != first.alpha or not same_mid or not _equal(lora.down, first.down):
            return None
        if lora.mid is not None and first.mid is not None and not _equal(lora.mid, first.mid):
            return None
    up = torch.zeros(shape[0], *first.up.shape[1:])
    for piece, lora in zip(pieces, loras, strict=True):
        up[piece.place] = lora.up.detach()
    return LoRA(up, first.down.detach(), first.alpha, shape, _own(first.mid))


def _stacked(pieces: Sequence[Piece], shape: Shape) -> LoRA:
    """A LoRA of all ranks together, alpha folded into up so that its scale is 1."""
    factors = [_factors(piece.adapter) for piece in pieces]
    rank, ones = sum(down.shape[0] for _, down in factors), (1,) * (len(shape) - 2)
    placed, column = torch.zeros(shape[0], rank), 0
    for piece, (up, _) in zip(pieces, factors, strict=True):
        placed[piece.place, column : column + up.shape[1]] = up
        column += up.shape[1]
    stacked = torch.cat([down for _, down in factors]).reshape(rank, *shape[1:])
    return LoRA(placed.reshape(shape[0], rank, *ones), stacked, float(rank), shape, None)


def _factors(adapter: Adapter) -> tuple[Tensor, Tensor]:
    if isinstance(adapter, Decomposable):
        factors = adapter.change_factors()
    else:
        factors = adapter.factors()
    if factors is None:
        raise ValueError(
            f"a change of the type {adapter.name} to some rows of a fused layer can't be used"
        )
    return factors[0].detach(), factors[1].detach()


def _magnitudes(pieces: Sequence[Piece], shape: Shape) -> nn.Parameter | None:
    """DoRA's magnitudes, which are a row's own matter; those of columns are not."""
    found = [getattr(piece.adapter, "magnitude", None) for piece in pieces]
    magnitudes = [magnitude for magnitude in found if magnitude is not None]
    if not magnitudes:
        return None
    rows = sum(piece.rows[2] for piece in pieces)
    by_row = all(
        magnitude.shape[0] == piece.rows[2] and magnitude[0].numel() == 1
        for piece, magnitude in zip(pieces, magnitudes, strict=False)
    )
    if len(magnitudes) < len(pieces) or rows < shape[0] or not by_row:
        raise ValueError(
            "DoRA on some rows of a fused layer can be used only where every row has a magnitude"
            f" of its own; {sum(m.shape[0] for m in magnitudes) if by_row else 0} of {shape[0]}"
            " rows have one"
        )
    return nn.Parameter(torch.cat([magnitude.detach() for magnitude in magnitudes]))


def _whole(adapter: Adapter) -> Piece:
    return Piece(adapter, (0, 0, adapter.shape[0]))


def _columns(shape: Shape) -> int:
    return int(torch.Size(shape[1:]).numel())


def _turned(tensor: Tensor) -> Tensor:
    first, second = tensor.detach().chunk(2)
    return torch.cat([second, first])


def _own(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and bool(torch.equal(first, second))
