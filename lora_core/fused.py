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

    Pieces that differ in nothing but their own rows, as `cut` makes them, keep their type and come
    back bit for bit. Raises ValueError for rows that are there twice and for types that can't be
    joined.
    """
    pieces = sorted(pieces, key=lambda piece: piece.rows[1])
    for before, after in zip(pieces, pieces[1:], strict=False):
        if before.place.stop > after.place.start:
            raise ValueError(f"rows {after.place.start} to {before.place.stop} are there twice")
    whole = _alike(pieces, shape) or _dense(pieces, shape)
    if whole is not None:
        return whole
    lora = _stacked(pieces, shape)
    lora.magnitude = _magnitudes(pieces, shape)
    return lora


def cut(adapter: Adapter, slices: Mapping[str, Slice]) -> dict[str, Adapter]:
    """The inverse of `joined`: {name: the adapter of these rows}, of the same type.

    Exact: rows of W + ΔW are those of the pieces. Raises ValueError where the type can't be cut,
    or not there.
    """
    axes = adapter.row_axes()
    if axes is None:
        what = "DoRA of columns" if getattr(adapter, "magnitude", None) is not None else ""
        raise ValueError(f"this {what or adapter.name} can't be cut into rows")
    pieces = {}
    for name, rows in slices.items():
        _, start, length = rows
        tensors = adapter.tensors()
        for key, (axis, step) in axes.items():
            if start % step or length % step:
                raise ValueError(
                    f"this {adapter.name} can be cut after every {step} rows only, not into rows"
                    f" {start} to {start + length}"
                )
            tensors[key] = tensors[key].narrow(axis, start // step, length // step)
        copies = {key: tensor.clone() for key, tensor in tensors.items()}
        pieces[name] = type(adapter).from_tensors(copies, piece_shape(adapter.shape, rows))
    return pieces


def swapped(adapter: Adapter) -> Adapter:
    """The adapter of the same layer with the two halves of its rows in the other order."""
    axes, half = adapter.row_axes(), adapter.shape[0] // 2
    if axes is not None and not any(half % step for _, step in axes.values()):
        tensors = adapter.tensors()
        turned = {key: _turned(tensors[key], axis) for key, (axis, _) in axes.items()}
        return type(adapter).from_tensors(tensors | turned, adapter.shape)
    lora = adapter if isinstance(adapter, LoRA) else _stacked([_whole(adapter)], adapter.shape)
    other = LoRA(_turned(lora.up, 0), lora.down.detach(), lora.alpha, lora.shape, _own(lora.mid))
    magnitude = adapter.magnitude if isinstance(adapter, Decomposable) else None
    if magnitude is not None:
        by_row = magnitude.shape[0] == adapter.shape[0] and magnitude.shape[1] == 1
        other.magnitude = nn.Parameter(_turned(magnitude, 0) if by_row else magnitude.detach())
    return other


def _alike(pieces: Sequence[Piece], shape: Shape) -> Adapter | None:
    """An adapter of the pieces' own type, where they differ in their rows alone; else None.

    Rows that no piece has are zeros, which may not be what leaves them as they are: see
    `Adapter.needs_all_rows`.
    """
    first, kind = pieces[0].adapter, type(pieces[0].adapter)
    axes, shared = first.row_axes(), first.tensors()
    adapters = [piece.adapter for piece in pieces]
    if axes is None or any(type(it) is not kind or it.row_axes() != axes for it in adapters):
        return None
    covered = sum(piece.rows[2] for piece in pieces)
    if covered < shape[0] and any(it.needs_all_rows for it in adapters):
        return None
    steps = [step for _, step in axes.values()]
    if any(
        number % step
        for piece in pieces
        for number in (*piece.rows[1:], shape[0])
        for step in steps
    ):
        return None
    whole = {key: _room(shared[key], axis, shape[0] // step) for key, (axis, step) in axes.items()}
    for piece in pieces:
        tensors = piece.adapter.tensors()
        others = tensors.keys() - axes.keys()
        if tensors.keys() != shared.keys() or not all(
            _equal(tensors[n], shared[n]) for n in others
        ):
            return None
        for key, (axis, step) in axes.items():
            start, length = piece.rows[1] // step, piece.rows[2] // step
            whole[key].narrow(axis, start, length).copy_(tensors[key])
    return kind.from_tensors({key: tensor.clone() for key, tensor in shared.items()} | whole, shape)


def _dense(pieces: Sequence[Piece], shape: Shape) -> Adapter | None:
    """A change in full, where the pieces' factors would be larger, or some have none; else None.

    None, too, where ΔW depends on W or all are LoRAs.
    """
    adapters = [piece.adapter for piece in pieces]
    if any(it.needs_weight for it in adapters) or all(isinstance(it, LoRA) for it in adapters):
        return None
    ranks = [it.factored_rank for it in adapters]
    known = [rank for rank in ranks if rank is not None]
    smaller = sum(known) * (shape[0] + _columns(shape)) < shape[0] * _columns(shape)
    if smaller and len(known) == len(ranks):
        return None
    change = torch.zeros(shape)
    for piece in pieces:
        empty = torch.empty(()).expand(piece.adapter.shape)
        change[piece.place] = piece.adapter.delta(empty).detach()
    return Full(change)


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


def _turned(tensor: Tensor, axis: int) -> Tensor:
    first, second = tensor.detach().chunk(2, axis)
    return torch.cat([second, first], axis)


def _room(tensor: Tensor, axis: int, length: int) -> Tensor:
    """Zeros like a tensor, but of another length along one axis."""
    return tensor.new_zeros((*tensor.shape[:axis], length, *tensor.shape[axis + 1 :]))


def _own(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and bool(torch.equal(first, second))
