"""A stack of LoRAs as one LoRA: what all of them do together at their strengths.

    D = Σ c_i ΔW_i,   c by the method: the strengths s themselves for "sum"

Exact, by writing the factors side by side (rank = the sum of the ranks), or the nearest of a rank
that a rule chooses. Never factor by factor: Σ up_i · Σ down_i has cross terms up_i · down_j.
Letters: O out, I in (kernel included), R the ranks of all on a layer.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters import Adapter, Bias
from ..adapters.add_change import factors_are_smaller
from ..adapters.bias import BiasChange
from ..adapters.full import Full
from ..adapters.lokr import LoKr
from ..adapters.lora import LoRA
from ..key_map import TEXT_ENCODER, part_of
from ..similarity import NeedsWeight, Weight, gram
from ..stack import Entry
from .in_parallel import each_layer
from .methods import ElementMethod, FactoredMethod, Method
from .methods.linear import Sum
from .rank_rule import RankRule
from .truncation import Truncated, of_dense, of_factors, of_kronecker

Part = tuple[float, Adapter]  # a factor, and what changes the layer
SUM = Sum()


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
    *,
    method: Method = SUM,
    seed: int = 0,
) -> Merged:
    """The stack as one LoRA by a method; without a rule exact.

    An exact layer is a LoRA of all ranks together, or where that is no smaller than D, D itself.
    Changes of norms and biases are added up. Schedules have no meaning here. `weight` gives the
    base weight of a path, for types whose change depends on it; as in the stack such a type sees
    what those before it left. Raises NeedsWeight naming a layer where it is None, and ValueError
    for layers whose shapes differ, and more LoRAs than the method can merge. Random methods draw
    from `seed` and the layer's path, whatever the order of the layers. `progress(done, of)` may
    raise to stop.
    """
    method.check(len(stack))
    layers = _layers(stack)
    _refuse_different_shapes(layers)

    def one(path: str) -> tuple[Adapter, float | None]:
        layer = layers[path]
        with torch.no_grad():
            if isinstance(method, ElementMethod):
                generator = torch.Generator().manual_seed(_seed_of(path, seed))
                change = _combined(path, layer, method, weight, generator)
                return _of_dense(change, list(layer.parts.values()), rule)
            assert isinstance(method, FactoredMethod)
            return _of_parts(path, _scaled(path, layer, method, weight), rule, weight)

    made = each_layer(one, list(layers), progress)
    return Merged(
        {path: adapter for path, (adapter, _) in made.items()},
        {path: kept for path, (_, kept) in made.items() if kept is not None},
    )


@dataclass(frozen=True)
class _Layer:
    """All strengths of the stack for a layer, and {place in the stack: (block weight, adapter)}."""

    strengths: Sequence[float]
    parts: Mapping[int, Part]


def _layers(stack: Sequence[Entry]) -> dict[str, _Layer]:
    """By path, what has a strength and a block weight other than 0."""
    layers: dict[str, _Layer] = {}
    for path in dict.fromkeys(path for entry in stack for path in entry.adapters):
        of_text = part_of(path) == TEXT_ENCODER
        strengths = [entry.strength_clip if of_text else entry.strength_model for entry in stack]
        parts = {
            index: (entry.weight(path), entry.adapters[path])
            for index, entry in enumerate(stack)
            if path in entry.adapters and entry.strength(path) != 0.0
        }
        if parts:
            layers[path] = _Layer(strengths, parts)
    return layers


def _scaled(path: str, layer: _Layer, method: FactoredMethod, weight: Weight | None) -> list[Part]:
    """The parts at the method's coefficients."""
    count = len(layer.strengths)
    products = torch.zeros(count, count, dtype=torch.float64)
    if method.needs_gram:
        loras = [{path: layer.parts[i][1]} if i in layer.parts else {} for i in range(count)]
        blocks = [layer.parts[i][0] if i in layer.parts else 0.0 for i in range(count)]
        at_one = gram(loras, [lambda _: 1.0] * count, weight)
        scales = torch.tensor(blocks, dtype=torch.float64)
        products = scales[:, None] * at_one * scales
    found = method.coefficients(products, layer.strengths)
    return [(found[index] * block, adapter) for index, (block, adapter) in layer.parts.items()]


def _combined(
    path: str,
    layer: _Layer,
    method: ElementMethod,
    weight: Weight | None,
    generator: torch.Generator,
) -> Tensor:
    """D of a method that works on elements; each ΔW as it is on the base weight alone."""
    changes = [_dense(path, [part], weight) for part in layer.parts.values()]
    strengths = [layer.strengths[index] for index in layer.parts]
    return method.combine(torch.stack(changes), strengths, generator)


def _of_parts(
    path: str, parts: Sequence[Part], rule: RankRule | None, weight: Weight | None
) -> tuple[Adapter, float | None]:
    """What the sum of parts becomes, and the share of its norm where that is not all."""
    shape = tuple(parts[0][1].shape)
    factors = _factors(parts) if len(shape) > 1 else None
    if factors is not None and rule is None:
        return _lora(*factors, shape), None
    if rule is None or len(shape) < 2:
        return _of_dense(_dense(path, parts, weight), parts, rule)
    found = _truncated(path, parts, factors, rule, weight)
    return _lora(found.up, found.down, shape), found.kept


def _of_dense(
    change: Tensor, parts: Sequence[Part], rule: RankRule | None
) -> tuple[Adapter, float | None]:
    """What D becomes that was made of the parts."""
    if isinstance(parts[0][1], BiasChange):
        return Bias(change), None
    if rule is None or change.ndim < 2:
        return Full(change), None
    found = of_dense(change.flatten(1), rule)
    return _lora(found.up, found.down, tuple(change.shape)), found.kept


def _truncated(
    path: str,
    parts: Sequence[Part],
    factors: tuple[Tensor, Tensor] | None,
    rule: RankRule,
    weight: Weight | None,
) -> Truncated:
    """By the cheapest way that is exact."""
    strength, adapter = parts[0]
    if len(parts) == 1 and isinstance(adapter, LoKr) and not adapter.needs_weight:
        first, second = adapter.blocks()
        return of_kronecker(strength * adapter.scale * first, second, rule)
    if factors is not None:
        return of_factors(*factors, rule)
    return of_dense(_dense(path, parts, weight).flatten(1), rule)


def _factors(parts: Sequence[Part]) -> tuple[Tensor, Tensor] | None:
    """U (O, R) and V (R, I) with D = U V, all side by side; None where D is no larger, or a part
    has none."""
    ranks = [adapter.factored_rank for _, adapter in parts]
    known = [rank for rank in ranks if rank is not None]
    if len(known) < len(ranks) or not factors_are_smaller(sum(known), parts[0][1].shape):
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
    needing = [adapter for _, adapter in parts if adapter.needs_weight]
    base = first.new_zeros(()).expand(parts[0][1].shape)
    if needing:
        if weight is None:
            raise NeedsWeight(path, needing[0])
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


def _refuse_different_shapes(layers: Mapping[str, _Layer]) -> None:
    problems = []
    for path, layer in layers.items():
        shapes = dict.fromkeys(tuple(adapter.shape) for _, adapter in layer.parts.values())
        if len(shapes) > 1:
            problems.append(f"{path}: made for weights of {' and '.join(map(str, shapes))}")
    if problems:
        raise ValueError("LoRAs of different models can't be merged:\n" + "\n".join(problems))


def _seed_of(path: str, seed: int) -> int:
    """The same for a layer whatever layers are beside it."""
    return seed + zlib.crc32(path.encode())
