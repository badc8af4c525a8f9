"""Changes of some rows of a fused layer, such as q of q/k/v, as one adapter of the whole layer.

    ΔW = Σ over the pieces of E · ΔW_piece,   E placing a piece's rows where they are in the layer

which is exact: what was cut is put together again; LoRAs become one, whose up has each piece's
rows at their place, and whose downs are stacked; others stay what they are, as `Pieces`. Rows that
no piece has stay unchanged. Letters as in adapters/base.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adapters import Adapter
from .adapters.dora import Decomposable
from .adapters.lora import LoRA
from .adapters.pieces import Pieces
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
    back bit for bit. Raises ValueError for rows that are there twice, and for changes of a bias in
    several ways.
    """
    pieces = sorted(pieces, key=lambda piece: piece.rows[1])
    for before, after in zip(pieces, pieces[1:], strict=False):
        if before.place.stop > after.place.start:
            raise ValueError(f"rows {after.place.start} to {before.place.stop} are there twice")
    whole = _alike(pieces, shape)
    if whole is not None:
        return whole
    if len(shape) == 1:
        kinds = ", ".join(dict.fromkeys(piece.adapter.name for piece in pieces))
        raise ValueError(f"its parts change it in several ways ({kinds}), expected one")
    if not _are_one_lora(pieces, shape):
        return Pieces({piece.place.start: piece.adapter for piece in pieces}, shape)
    lora = _stacked(pieces, shape)
    magnitudes = [getattr(piece.adapter, "magnitude", None) for piece in pieces]
    if magnitudes[0] is not None:
        lora.magnitude = nn.Parameter(torch.cat([m.detach() for m in magnitudes if m is not None]))
    return lora


def cut(adapter: Adapter, slices: Mapping[str, Slice]) -> dict[str, Adapter]:
    """The inverse of `joined`: {name: the adapter of these rows}, of the same type.

    Exact: rows of W + ΔW are those of the pieces. Of `Pieces` those rows are left out that have
    none. Raises ValueError where the type can't be cut, or not there.
    """
    if isinstance(adapter, Pieces):
        return _taken_apart(adapter, slices)
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


def _are_one_lora(pieces: Sequence[Piece], shape: Shape) -> bool:
    """Whether all are LoRAs and none is a DoRA, or all are DoRAs whose magnitudes are of all rows.

    A DoRA of columns and a row without magnitude have no place in a DoRA of the whole layer.
    """
    magnitudes = [piece.adapter.magnitude for piece in pieces if isinstance(piece.adapter, LoRA)]
    if len(magnitudes) < len(pieces):
        return False
    if all(magnitude is None for magnitude in magnitudes):
        return True
    by_row = all(
        magnitude is not None and magnitude.shape[0] == piece.rows[2] and magnitude[0].numel() == 1
        for piece, magnitude in zip(pieces, magnitudes, strict=True)
    )
    return by_row and sum(piece.rows[2] for piece in pieces) == shape[0]


def _taken_apart(pieces: Pieces, slices: Mapping[str, Slice]) -> dict[str, Adapter]:
    """{name: the piece of these rows}."""
    names = {(start, start + length): name for name, (_, start, length) in slices.items()}
    found = {(place.start, place.stop): part for place, part in pieces.placed()}
    if strange := found.keys() - names.keys():
        shown = ", ".join(f"{start} to {stop}" for start, stop in sorted(strange))
        raise ValueError(f"its changes of the rows {shown} are of none of them")
    return {names[rows]: part for rows, part in found.items()}


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
        raise ValueError(f"the rows of a {adapter.name} can't be put in another order")
    return factors[0].detach(), factors[1].detach()


def _whole(adapter: Adapter) -> Piece:
    return Piece(adapter, (0, 0, adapter.shape[0]))


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
