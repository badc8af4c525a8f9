"""DoRA's gradients, also where a gain is zero or near it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lora_weave.lora_core.adapters.lora import LoRA

from .layer_kinds import make_adapter, make_input, make_layer, run

Close = Callable[..., None]
kinds = pytest.mark.parametrize("kind", ["linear", "conv2d-3x3"])


def dora(kind: str) -> LoRA:
    weight = make_layer(kind).weight
    adapter = make_adapter("lora", tuple(weight.shape))
    assert isinstance(adapter, LoRA)
    adapter.decompose(weight)
    return adapter


@kinds
@pytest.mark.parametrize("magnitude", [1.0, 1e-3, 0.0, -1.0])
def test_gradients_for_every_gain(kind: str, magnitude: float, assert_close: Close) -> None:
    """Of a row's magnitude, too, where the result no longer tells the output before scaling."""
    layer, adapter, x = make_layer(kind), dora(kind), make_input(kind).requires_grad_()
    assert adapter.magnitude is not None
    adapter.magnitude.data[1] *= magnitude
    inputs = [x, *adapter.parameters()]
    out = run(layer, adapter, x)
    change = adapter.delta(layer.weight)
    expected = torch.func.functional_call(layer, {"weight": layer.weight + change}, (x,))
    assert_close(out, expected)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    found, wanted = (torch.autograd.grad(o, inputs, grad) for o in (out, expected))
    assert found[-1].flatten()[1].abs() > 0.01
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs)
