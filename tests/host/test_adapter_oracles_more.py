"""The host's own arithmetic for types with no factors of their own, where the host has it right."""

import comfy.lora
import pytest
import torch
from torch import Tensor

from lora_weave.lora_core.adapters import ADAPTERS, Adapter, Bias
from lora_weave.lora_core.adapters.create_options import CreateOptions

SHAPES = {"linear": (12, 10), "square": (8, 8), "conv": (8, 6, 3, 3)}
STRENGTHS = [1.0, 0.5, -1.5]
every_shape = pytest.mark.parametrize("shape", list(SHAPES.values()), ids=list(SHAPES))
every_strength = pytest.mark.parametrize("strength", STRENGTHS)


def random_adapter(name: str, shape: tuple[int, ...], **options) -> Adapter:
    adapter = ADAPTERS[name].create(shape, 4, 3.0, options=CreateOptions(**options))
    return randomised(adapter)


def randomised(adapter: Adapter) -> Adapter:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return adapter


def random_weight(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def hosts_change(tensors: dict[str, Tensor], weight: Tensor, strength: float, key="x.weight"):
    """What the host's loader makes of a file's tensors."""
    named = {f"x.{name}": tensor for name, tensor in tensors.items()}
    loaded = comfy.lora.load_lora(named, {"x": "x.weight"}, log_missing=False)
    patch = [(strength, loaded[key], 1.0, None, None)]
    return comfy.lora.calculate_weight(patch, weight.clone(), key) - weight


def assert_equal(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < tolerance, error


@every_strength
@pytest.mark.parametrize("shape", [*SHAPES.values(), (6,)], ids=[*SHAPES, "norm"])
def test_full(shape, strength):
    adapter, weight = random_adapter("full", shape), random_weight(shape)
    expected = hosts_change(adapter.tensors(), weight, strength)
    assert_equal(strength * adapter.delta(weight).detach(), expected)


@every_strength
def test_a_bias(strength):
    bias, start = randomised(Bias.create((6,))), random_weight((6,))
    expected = hosts_change(bias.tensors(), start, strength, key="x.bias")
    assert_equal(strength * bias.delta(start).detach(), expected)


@every_shape
@pytest.mark.parametrize("name", ["oft", "boft"])
def test_rotations(name, shape):
    """At strength 1 without rescale and limit: at any other the host applies strength twice, it
    leaves out OFT's rescale, and it takes alpha itself as the limit (weight_adapter/oft.py)."""
    adapter, weight = random_adapter(name, shape), random_weight(shape)
    assert_equal(adapter.delta(weight).detach(), hosts_change(adapter.tensors(), weight, 1.0))


@every_shape
def test_rescale_of_boft(shape):
    adapter, weight = random_adapter("boft", shape, rescale=True), random_weight(shape)
    assert_equal(adapter.delta(weight).detach(), hosts_change(adapter.tensors(), weight, 1.0))
