"""How LoRAs lie to each other: inner products of their changes, from factors.

Letters: N LoRAs, R the ranks of all on one layer, O out, I in (kernel included).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .adapters import Adapter

Strength = Callable[[str], float]  # of a layer path
Weight = Callable[[str], Tensor]  # the base weight of a layer path


class NeedsWeight(ValueError):
    """A change that depends on the base weight, which is not known."""

    def __init__(self, path: str, adapter: Adapter) -> None:
        kinds = " and a ".join(dict.fromkeys(one.name for one in adapter.members()))
        super().__init__(f"{path}: the change of a {kinds} depends on the base weight")


def gram(
    loras: Sequence[Mapping[str, Adapter]],
    strengths: Sequence[Strength],
    weight: Weight | None = None,
) -> Tensor:
    """G (N, N), float64: G_ij = sum over layers of <s_i ΔW_i, s_j ΔW_j>.

    From factors, <U V, U' V'> = sum((UᵀU') ∘ (V V'ᵀ)), in R² (O + I) multiplications a layer. A
    change without factors, or whose rank is not below the layer's sides, is made dense, one layer
    at a time. `weight` gives the base weight for types whose change depends on it (DoRA, OFT, IA3);
    raises NeedsWeight naming a layer where it is None.
    """
    total = torch.zeros(len(loras), len(loras), dtype=torch.float64)
    paths = dict.fromkeys(path for lora in loras for path in lora)
    with torch.no_grad():
        for path in paths:
            members = [index for index, lora in enumerate(loras) if path in lora]
            parts = [_Part.of(path, loras[index][path], weight) for index in members]
            scales = torch.tensor([strengths[index](path) for index in members]).double()
            if scales.any():
                places = torch.tensor(members)
                total[places[:, None], places] += scales[:, None] * _products(parts) * scales
    return total


def cosines(products: Tensor) -> Tensor:
    """(N, N) cosines of a Gram matrix; 0 beside a LoRA that changes nothing."""
    norms = products.diagonal().clamp(min=0).sqrt()
    sizes = norms[:, None] * norms
    return torch.where(sizes > 0, products / sizes.clamp(min=1e-300), 0.0).clamp(-1.0, 1.0)


class _Part:
    """The change of one layer: its factors, or dense (O, I)."""

    def __init__(self, up: Tensor | None, down: Tensor) -> None:
        self.up, self.down = up, down

    @classmethod
    def of(cls, path: str, adapter: Adapter, weight: Weight | None) -> _Part:
        rank = adapter.factored_rank
        if rank is not None and len(adapter.shape) > 1:
            rows, columns = adapter.shape[0], torch.Size(adapter.shape[1:]).numel()
            factors = adapter.factors() if rank < min(rows, columns) else None
            if factors is not None:
                return cls(factors[0].float(), factors[1].float())
        if not adapter.needs_weight:
            like = torch.empty(()).expand(adapter.shape)
        elif weight is None:
            raise NeedsWeight(path, adapter)
        else:
            like = weight(path).cpu().float()
        return cls(None, adapter.delta(like).float().reshape(len(like), -1))


def _products(parts: Sequence[_Part]) -> Tensor:
    """(n, n) inner products of the changes of one layer."""
    found = torch.zeros(len(parts), len(parts), dtype=torch.float64)
    factored = [
        (index, part.up, part.down) for index, part in enumerate(parts) if part.up is not None
    ]
    if factored:
        ups, downs = (
            torch.cat([up for _, up, _ in factored], 1),
            torch.cat([d for *_, d in factored]),
        )
        owners = torch.tensor([index for index, up, _ in factored for _ in range(up.shape[1])])
        belongs = torch.nn.functional.one_hot(owners, len(parts)).double()  # (R, n)
        found += belongs.t() @ ((ups.t() @ ups) * (downs @ downs.t())).double() @ belongs
    for index, part in enumerate(parts):
        if part.up is None:
            for other, beside in enumerate(parts):
                if beside.up is not None or other >= index:
                    found[index, other] = found[other, index] = _dot(part.down, beside)
    return found


def _dot(dense: Tensor, other: _Part) -> Tensor:
    """<D, U V> = sum((Uᵀ D) ∘ V), or of two dense changes."""
    left = dense if other.up is None else other.up.t() @ dense
    return (left * other.down).sum(dtype=torch.float64)
