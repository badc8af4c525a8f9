"""Check the tensors of a file against the shapes that a layer takes, all problems at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Shape = tuple[int, ...]


def fitted(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Shape], problems: Sequence[str] = ()
) -> dict[str, Tensor]:
    """The tensors named in `wanted`, each reshaped to its shape there.

    Files hold convolutions flattened behind the second axis, or linear layers as 1x1 convolutions:
    both are taken. Raises ValueError with `problems`, every tensor that is missing or of another
    shape, and an "alpha" of more than one value.
    """
    missing = [name for name in wanted if name not in tensors]
    found = [f"{', '.join(missing)} is missing"] if missing else []
    found += [
        f"{name} is {tuple(tensors[name].shape)}, expected {shape}"
        for name, shape in wanted.items()
        if name in tensors and not _same_layout(tensors[name].shape, shape)
    ]
    alpha = tensors.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        found.append(f"alpha has {alpha.numel()} values, expected 1")
    if found or problems:
        raise ValueError("; ".join([*problems, *found]))
    return {name: tensors[name].reshape(shape) for name, shape in wanted.items()}


def alpha_of(tensors: Mapping[str, Tensor], rank: int) -> float:
    """The file's alpha; without one it is the rank, a scale of 1."""
    alpha = tensors.get("alpha")
    return float(rank if alpha is None else alpha.item())


def first_size(tensors: Mapping[str, Tensor], name: str) -> int:
    """The first axis of a tensor, which is often the rank; 0 where there is none.

    Raises ValueError where the tensor is missing.
    """
    if name not in tensors:
        raise ValueError(f"{name} is missing")
    return tensors[name].shape[0] if tensors[name].ndim else 0


def _same_layout(found: torch.Size, expected: Shape) -> bool:
    """Equal shapes, or one is the other flattened behind the second axis (files hold both)."""
    if tuple(found) == expected:
        return True
    flat = (expected[0], math.prod(expected[1:]))
    return len(expected) > 1 and (
        tuple(found) == flat
        or (tuple(found[:2]) == expected[:2])
        and math.prod(found[2:]) == math.prod(expected[2:]) == 1
    )
