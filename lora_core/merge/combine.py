"""A stack of LoRAs as one LoRA: what all of them do together at their strengths.

    D = Σ s_i ΔW_i

Exact, by writing the factors side by side (rank = the sum of the ranks), or the nearest of a rank
that a rule chooses. Never factor by factor: Σ up_i · Σ down_i has cross terms up_i · down_j.
Letters: O out, I in (kernel included), R the ranks of all on a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters import Adapter, Bias
from ..adapters.bias import BiasChange
from ..adapters.full import Full
from ..adapters.lokr import LoKr
from ..adapters.lora import LoRA
from ..similarity import NeedsWeight, Weight
from ..stack import Entry
from .in_parallel import each_layer
from .rank_rule import RankRule
from .truncation import Truncated, of_dense, of_factors, of_kronecker

Part = tuple[float, Adapter]  # a strength, and what changes the layer


@dataclass(frozen=True)
class Merged:
    """The adapters of one LoRA, and of each layer with fewer directions the share of D's norm."""

    adapters: dict[str, Adapter]
    kept: dict[str, float]


def merge(
    stack: Sequence[Entry],
    rule: RankRule | None = None,
    weight: Weight | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Merged:
    """The stack as one LoRA; without a rule exact.

    An exact layer is a LoRA of all ranks together, or where that is no smaller than D, D itself.
    Changes of norms and biases are added up. Schedules have no meaning here. `weight` gives the
    base weight of a path, for types whose change depends on it; as in the stack such a type sees
    what those before it left. Raises NeedsWeight naming a layer where it is None, and ValueError
    for layers whose shapes differ. `progress(done, of)` may raise to stop.
    """
    parts: dict[str, list[Part]] = {}
    for entry in stack:
        for path, adapter in entry.adapters.items():
            if entry.strength(path) != 0.0:
                parts.setdefault(path, []).append((entry.strength(path), adapter))
    _refuse_different_shapes(parts)

    def one(path: str) -> tuple[Adapter, float | None]:
        with torch.no_grad():
            return _merged(path, parts[path], rule, weight)

    made = each_layer(one, list(parts), progress)
    return Merged(
        {path: adapter for path, (adapter, _) in made.items()},
        {path: kept for path, (_, kept) in made.items() if kept is not None},
    )


def _merged(
    path: str, parts: Sequence[Part], rule: RankRule | None, weight: Weight | None
) -> tuple[Adapter, float | None]:
    """What the parts of one layer become, and the share of its norm where that is not all."""
    shape = parts[0][1].shape
    if len(shape) < 2:
        is_bias = isinstance(parts[0][1], BiasChange)
        change = _dense(path, parts, weight)
        return Bias(change) if is_bias else Full(change), None
    if rule is None:
        factors = _factors(parts)
        return Full(_dense(path, parts, weight)) if factors is None else _lora(
            *factors, shape
        ), None
    found = _truncated(path, parts, rule, weight)
    return _lora(found.up, found.down, shape), found.kept


def _truncated(
    path: str, parts: Sequence[Part], rule: RankRule, weight: Weight | None
) -> Truncated:
    """By the cheapest way that is exact."""
    strength, adapter = parts[0]
    if len(parts) == 1 and isinstance(adapter, LoKr) and not adapter.needs_weight:
        first, second = adapter.blocks()
        return of_kronecker(strength * adapter.scale * first, second, rule)
    factors = _factors(parts)
    if factors is not None:
        return of_factors(*factors, rule)
    return of_dense(_dense(path, parts, weight).flatten(1), rule)


def _factors(parts: Sequence[Part]) -> tuple[Tensor, Tensor] | None:
    """U (O, R) and V (R, I) with D = U V, all side by side; None where D is no larger, or a part
    has none."""
    shape = parts[0][1].shape
    rows, columns = shape[0], math.prod(shape[1:])
    ranks = [adapter.factored_rank for _, adapter in parts]
    known = [rank for rank in ranks if rank is not None]
    if len(known) < len(ranks) or sum(known) * (rows + columns) >= rows * columns:
        return None
    ups, downs = [], []
    for strength, adapter in parts:
        scale, up, down = adapter.scaled_factors()
        ups.append(strength * scale * up)
        downs.append(down)
    return torch.cat(ups, 1), torch.cat(downs, 0)


def _dense(path: str, parts: Sequence[Part], weight: Weight | None) -> Tensor:
    """D in the weight's shape."""
    first = next(parts[0][1].parameters())
    needing = [adapter.name for _, adapter in parts if adapter.needs_weight]
    base = first.new_zeros(()).expand(parts[0][1].shape)
    if needing:
        if weight is None:
            raise NeedsWeight(f"{path}: the change of a {needing[0]} depends on the base weight")
        base = weight(path).to(first.device, first.dtype)
    change = torch.zeros_like(base, memory_format=torch.contiguous_format)
    for strength, adapter in parts:
        seen = base + change if adapter.needs_weight else base
        change.add_(adapter.delta(seen).reshape(change.shape), alpha=strength)
    return change


def _lora(up: Tensor, down: Tensor, shape: tuple[int, ...]) -> LoRA:
    """A LoRA of scale 1 from up (O, R) and down (R, I), for a weight of `shape`."""
    ones, rank = (1,) * (len(shape) - 2), up.shape[1]
    return LoRA(
        up.reshape(shape[0], rank, *ones).contiguous(),
        down.reshape(rank, *shape[1:]).contiguous(),
        float(rank),
        tuple(shape),
        None,
    )


def _refuse_different_shapes(parts: dict[str, list[Part]]) -> None:
    problems = []
    for path, changes in parts.items():
        shapes = dict.fromkeys(tuple(adapter.shape) for _, adapter in changes)
        if len(shapes) > 1:
            problems.append(f"{path}: made for weights of {' and '.join(map(str, shapes))}")
    if problems:
        raise ValueError("LoRAs of different models can't be merged:\n" + "\n".join(problems))
