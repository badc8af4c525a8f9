"""Adapters as files hold them: every form of every type, on every kind of layer, for oracles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn

from lora_weave.lora_core.adapters import Adapter
from lora_weave.lora_core.adapters.create_options import CreateOptions
from lora_weave.lora_core.adapters.dora import Decomposable

from .layer_kinds import KINDS, Case, cases, make_layer

# What a `dora_scale` may look like in files, and the axis of the weight that it goes along.
MAGNITUDES = {"out": 0, "in": 1, "1d": 0}


@dataclass(frozen=True)
class Sample:
    """An adapter in a file: a case of `layer_kinds`, its tensors, and the layer that it is for.

    `magnitude` says which `dora_scale` the file has: (O, 1, ...) "out", (1, I, 1, ...) "in",
    (O,) "1d", or none.
    """

    name: str
    case: Case
    kind: str
    magnitude: str | None = None
    dtype: torch.dtype = torch.float32

    @property
    def form(self) -> str:
        return self.name if self.magnitude is None else f"{self.name}+dora-{self.magnitude}"

    @property
    def layer(self) -> nn.Module:
        return make_layer(self.kind, self.dtype)

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """As in a file, without the layer's prefix; alpha stays float32."""
        named = _tensors(self.case, self.kind, self.magnitude)
        return {n: t.clone() if n == "alpha" else t.to(self.dtype) for n, t in named.items()}

    @property
    def rank(self) -> int:
        return self.case.rank

    @property
    def alpha(self) -> float:
        return float(self.tensors["alpha"])

    def adapter(self) -> Adapter:
        return self.case.type.from_tensors(self.tensors, self.shape)

    def in_dtype(self, dtype: torch.dtype) -> Sample:
        return replace(self, dtype=dtype)

    def __str__(self) -> str:
        return f"{self.form}-{self.kind}"


def samples() -> list[Sample]:
    """Every form on every kind of layer where it is one: no Tucker form of a linear layer."""
    found: list[Sample] = []
    for name, case in cases().items():
        magnitudes = (None, *(MAGNITUDES if issubclass(case.type, Decomposable) else ()))
        found += [
            Sample(name, case, kind, magnitude)
            for kind in KINDS
            if not case.decomposed and _is_a_form_of_its_own(case, kind)
            for magnitude in magnitudes
        ]
    return found


def _is_a_form_of_its_own(case: Case, kind: str) -> bool:
    """Whether each switch that the case turns on makes another adapter of it; if it turns on
    none, whether its other options do.
    """

    def makes_another(options: CreateOptions) -> bool:
        other = _tensors(replace(case, options=options), kind, None)
        return found.keys() != other.keys() or not all(
            torch.equal(found[name], other[name]) for name in found
        )

    found, default = _tensors(case, kind, None), CreateOptions()
    switches = [name for name, value in vars(case.options).items() if value is True]
    if not switches:
        return case.options == default or makes_another(default)
    return all(makes_another(replace(case.options, **{name: False})) for name in switches)


@cache
def _tensors(case: Case, kind: str, magnitude: str | None) -> dict[str, Tensor]:
    tensors = case.make(kind).tensors()
    if magnitude is None:
        return tensors
    weight, axis = make_layer(kind).weight, MAGNITUDES[magnitude]
    norms = torch.stack([row.norm() for row in weight.unbind(axis)])
    factors = torch.rand(len(norms), generator=torch.Generator().manual_seed(6)) + 0.5
    ones = [1] * (weight.ndim - 2)
    shape = {"out": (-1, 1, *ones), "in": (1, -1, *ones), "1d": (-1,)}[magnitude]
    return {**tensors, "dora_scale": (norms * factors).reshape(shape)}
