"""One small layer of every kind that an adapter can sit on."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lora_weave.lora_core.adapters import ADAPTERS, Adapter, Layer
from lora_weave.lora_core.adapters.create_options import CreateOptions
from lora_weave.lora_core.adapters.dora import Decomposable
from lora_weave.lora_core.attach import attached


@dataclass(frozen=True)
class Kind:
    """`make()` gives the layer, `input_shape` is one that it takes."""

    make: Callable[[], nn.Module]
    input_shape: tuple[int, ...]


KINDS = {
    "linear": Kind(lambda: nn.Linear(12, 10), (2, 5, 12)),
    "linear-2d-input": Kind(lambda: nn.Linear(12, 10), (7, 12)),
    "linear-odd": Kind(lambda: nn.Linear(7, 13, bias=False), (1, 3, 1, 7)),
    "conv1d": Kind(lambda: nn.Conv1d(6, 8, 3, padding=2, dilation=2), (2, 6, 9)),
    "conv2d-1x1": Kind(lambda: nn.Conv2d(6, 8, 1), (2, 6, 5, 4)),
    "conv2d-3x3": Kind(lambda: nn.Conv2d(4, 8, 3, padding=1), (2, 4, 5, 3)),
    "conv2d-5x5": Kind(lambda: nn.Conv2d(3, 5, 5, padding=2), (1, 3, 4, 6)),
    "conv2d-3x3-large": Kind(lambda: nn.Conv2d(2, 3, 3, padding=1), (1, 2, 17, 16)),
    "conv2d-3x3-stride-2": Kind(lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1), (2, 4, 7, 6)),
    "conv2d-odd": Kind(
        lambda: nn.Conv2d(9, 12, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        (1, 9, 7, 5),
    ),
    "conv3d": Kind(
        lambda: nn.Conv3d(3, 4, (3, 3, 1), stride=(1, 2, 1), padding=(1, 1, 0)), (2, 3, 3, 5, 2)
    ),
}
RANK, ALPHA = 4, 3.0


def make_layer(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The kind's layer with frozen weights from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layer = KINDS[kind].make()
    return layer.requires_grad_(False).to(dtype)


def make_input(kind: str, dtype: torch.dtype = torch.float32, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(KINDS[kind].input_shape, generator=generator, dtype=torch.float64).to(dtype)


def facts(layer: nn.Module) -> Layer:
    """What an adapter may know of the layer."""
    weight, bias = layer.weight, layer.bias
    if isinstance(layer, nn.Linear):
        return Layer(shape=tuple(weight.shape), weight=lambda: weight, bias=lambda: bias)
    return Layer(
        shape=tuple(weight.shape),
        weight=lambda: weight,
        bias=lambda: bias,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
    )


@dataclass(frozen=True)
class Case:
    """A type as it can be trained: with options, or weight-decomposed (DoRA)."""

    name: str
    rank: int = RANK
    options: CreateOptions = CreateOptions()
    decomposed: bool = False

    @property
    def type(self) -> type[Adapter]:
        return ADAPTERS[self.name]

    def make(self, kind: str, *, filled: bool = True) -> Adapter:
        """An adapter for the kind's layer; `filled` with numbers where it starts as no change."""
        generator = torch.Generator().manual_seed(3)
        shape = tuple(make_layer(kind).weight.shape)
        adapter = self.type.create(
            shape, self.rank, ALPHA, options=self.options, generator=generator
        )
        if self.decomposed:
            assert isinstance(adapter, Decomposable)
            adapter.decompose(make_layer(kind).weight)
        if filled:
            fill(adapter, generator)
        return adapter


def cases() -> dict[str, Case]:
    """Every registered type, alone and with what its options change."""
    found = {name: Case(name) for name in ADAPTERS}
    found |= {
        "lora-tucker": Case("lora", options=CreateOptions(tucker=True)),
        "loha-tucker": Case("loha", rank=2, options=CreateOptions(tucker=True)),
        "lokr-low": Case("lokr", rank=1),
        "lokr-both": Case("lokr", rank=1, options=CreateOptions(decompose_both=True)),
        "lokr-factor": Case("lokr", rank=2, options=CreateOptions(factor=2)),
        "lokr-tucker": Case("lokr", rank=1, options=CreateOptions(tucker=True, factor=2)),
        "ia3-on-input": Case("ia3", options=CreateOptions(on_input=True)),
        "oft-on-input": Case("oft", options=CreateOptions(on_input=True)),
        "oft-constrained": Case("oft", options=CreateOptions(constraint=0.0625)),
        "oft-rescaled": Case("oft", options=CreateOptions(rescale=True)),
        "boft-small": Case("boft", rank=2),
        "boft-constrained": Case("boft", options=CreateOptions(constraint=0.0625)),
        "boft-rescaled": Case("boft", rank=2, options=CreateOptions(rescale=True)),
    }
    decomposable = {n: c for n, c in found.items() if issubclass(c.type, Decomposable)}
    return found | {
        f"{name}+dora": replace(case, decomposed=True) for name, case in decomposable.items()
    }


def make_adapter(name: str, shape: tuple[int, ...], *, filled: bool = True) -> Adapter:
    """An adapter of the type `name`; `filled` with numbers where it would start as no change."""
    generator = torch.Generator().manual_seed(3)
    adapter = ADAPTERS[name].create(shape, RANK, ALPHA, generator=generator)
    if filled:
        fill(adapter, generator)
    return adapter


def fill(adapter: Adapter, generator: torch.Generator) -> None:
    """Random numbers about 0.3 in size, so that a product of two or three still counts."""
    with torch.no_grad():
        for parameter in adapter.parameters():
            change = torch.empty_like(parameter).normal_(0.0, 0.3, generator=generator)
            gains = (getattr(adapter, name, None) for name in ("magnitude", "rescale"))
            keeps = any(gain is parameter for gain in gains)  # a norm, or a factor about 1
            parameter.copy_(parameter * (1.0 + change) if keeps else change)


def run(layer: nn.Module, adapter: Adapter, x: Tensor) -> Tensor:
    """The layer's output with the adapter on it."""
    with attached({"layer": layer}, {"layer": adapter}, {"layer": facts(layer)}):
        return layer(x)


def with_weight(layer: nn.Module, change: Tensor, x: Tensor) -> Tensor:
    """The layer's output in float64 with `change` added to its weight."""
    parameters = {name: value.double() for name, value in layer.named_parameters()}
    parameters["weight"] = parameters["weight"] + change.double()
    return torch.func.functional_call(layer, parameters, (x.double(),))
