"""The host's own arithmetic for norms, biases and an old layout; `test_files.py` has the rest."""

import comfy.lora
import pytest
import torch
from torch import Tensor

from lora_weave.lora_core.adapters import ADAPTERS, Adapter, Bias
from lora_weave.lora_core.adapters.create_options import CreateOptions

SHAPES = {"linear": (12, 10), "square": (8, 8)}
STRENGTHS = [1.0, 0.5, -1.5]
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
def test_a_norm(strength):
    adapter, weight = random_adapter("full", (6,)), random_weight((6,))
    expected = hosts_change(adapter.tensors(), weight, strength)
    assert_equal(strength * adapter.delta(weight).detach(), expected)


@every_strength
def test_a_bias(strength):
    bias, start = randomised(Bias.create((6,))), random_weight((6,))
    expected = hosts_change(bias.tensors(), start, strength, key="x.bias")
    assert_equal(strength * bias.delta(start).detach(), expected)


@pytest.mark.parametrize("shape", list(SHAPES.values()), ids=list(SHAPES))
def test_glora_of_the_old_layout(shape):
    """The two of a pair under each other's name; the host reads those of linear layers."""
    adapter, weight = random_adapter("glora", shape), random_weight(shape)
    other = str.maketrans("12", "21")
    old = {name.translate(other): tensor for name, tensor in adapter.tensors().items()}
    found = type(adapter).from_tensors(old, shape).delta(weight).detach()
    assert_equal(found, hosts_change(old, weight, 1.0))
