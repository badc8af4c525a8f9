"""Every change of a bias against its formula: the output, its gradients, and finite differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lora_weave.lora_core.adapters import BIASES, Adapter, Layer

from .layer_kinds import KINDS, facts, fill, make_input, make_layer

# {type: the bias (O,) that its one tensor makes of the model's own}
CHANGED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bias": lambda bias, diff: bias + diff,
    "bias gain": lambda bias, gain: bias * (1.0 + gain),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
every_type = pytest.mark.parametrize("name", BIASES)
every_kind = pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if make_layer(kind).bias is not None]
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
Close = Callable[..., None]


def make(name: str, size: int) -> Adapter:
    adapter = BIASES[name].create((size,), 1, 1.0)
    fill(adapter, torch.Generator().manual_seed(3))
    return adapter


def bias_facts(layer: Layer) -> Layer:
    """Those of the layer's bias, as the host's bridge gives them."""
    return replace(layer, shape=layer.shape[:1], channel_axis=1 if len(layer.shape) > 2 else -1)


def with_bias(module: torch.nn.Module, bias: Tensor, x: Tensor) -> Tensor:
    """The module's output in float64 with another bias."""
    parameters = {"weight": module.weight.double(), "bias": bias}
    return torch.func.functional_call(module, parameters, (x.double(),))


@every_type
@every_kind
@every_dtype
def test_output_and_gradients_are_those_of_the_changed_bias(
    name: str, kind: str, dtype: torch.dtype, assert_close: Close
) -> None:
    module, x = make_layer(kind, dtype), make_input(kind, dtype)
    adapter = make(name, len(module.bias))
    adapter = adapter.double() if dtype == torch.float64 else adapter
    (parameter,) = adapter.parameters()
    exact = parameter.detach().double().requires_grad_()
    expected = with_bias(module, CHANGED[name](module.bias.double(), exact), x)
    assert_close(module.bias + adapter.delta(module.bias), CHANGED[name](module.bias, parameter))
    for layer in (facts(module), bias_facts(facts(module))):
        out = adapter(x, module(x), layer)
        assert out.dtype == dtype
        assert_close(out, expected)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    out.backward(grad)
    expected.backward(grad.double())
    assert parameter.grad is not None and parameter.grad.dtype == parameter.dtype
    assert_close(parameter.grad, exact.grad, dtype)


@every_type
@every_kind
def test_gradcheck(name: str, kind: str) -> None:
    """Of the adapter's tensor and of what comes out of the layer before it."""
    module, x = make_layer(kind, torch.float64), make_input(kind, torch.float64)
    adapter, layer = make(name, len(module.bias)).double(), bias_facts(facts(module))
    out = module(x).requires_grad_()
    inputs = (out, *adapter.parameters())
    assert torch.autograd.gradcheck(lambda out, *_: adapter(x, out.clone(), layer), inputs)


@every_type
def test_starts_as_no_change(name: str) -> None:
    module, x = make_layer("conv2d-3x3"), make_input("conv2d-3x3")
    adapter = BIASES[name].create(tuple(module.bias.shape), 1, 1.0)
    assert torch.equal(adapter(x, module(x), bias_facts(facts(module))), module(x))
    assert not adapter.delta(module.bias).any()
