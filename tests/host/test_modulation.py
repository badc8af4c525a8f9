"""Changes of the parameters of Wan's blocks and head, which the host reads and does not apply."""

from __future__ import annotations

import comfy.lora
import comfy.model_management
import comfy.sd
import pytest
import torch
from torch import Tensor

from lora_weave.lora_core.adapters import Adapter
from lora_weave.lora_core.adapters.full import Full
from lora_weave.lora_core.host.apply import Entry, apply
from lora_weave.lora_core.host.models import key_map
from lora_weave.lora_core.lora_file import LoraFile

from ..core.tolerances import assert_close
from .families import build
from .one_step import sample


@pytest.fixture(autouse=True)
def executor():
    """The host runs a node in inference mode."""
    with torch.inference_mode():
        yield
    comfy.model_management.unload_all_models()


def changes(model, seed: int = 0) -> dict[str, Adapter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        path: Full(0.3 * torch.randn(layer.shape, generator=generator))
        for path, layer in key_map(model, None).parameters.items()
    }


def parameters(model) -> dict[str, Tensor]:
    named = model.model.named_parameters()
    return {name: one.detach().clone() for name, one in named if name.endswith(".modulation")}


def test_every_modulation_of_the_host_is_a_parameter():
    model = build("Wan")
    layers = key_map(model, None).parameters
    assert {path: layer.shape for path, layer in layers.items()} == {
        name: tuple(one.shape) for name, one in parameters(model).items()
    }
    assert "diffusion_model.head.modulation" in layers and len(layers) > 1


def test_names_are_those_that_the_host_reads(caplog):
    model = build("Wan")
    adapters = changes(model)
    tensors = LoraFile(adapters).to_kohya(key_map(model, None))
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    patches = comfy.lora.load_lora(dict(tensors), names)
    assert "not loaded" not in caplog.text and patches.keys() == adapters.keys()
    before = parameters(model)
    ours, _ = apply(model, None, [Entry(adapters, 0.7, 0.7)])
    for key, patch in patches.items():
        wanted = comfy.lora.calculate_weight(
            [(0.7, patch, 1.0, None, None)], before[key].clone(), key
        )
        assert_close(ours.get_model_object(key), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_with_them_samples_as_one_made_so(dtype):
    model, by_hand = build("Wan", dtype=dtype), build("Wan", dtype=dtype)
    plain, before = sample(model, "Wan"), parameters(model)
    first, second = changes(model), changes(model, seed=1)
    stack = [Entry(first, 1.0, 1.0), Entry(second, -0.5, 1.0), Entry(second, 0.0, 1.0)]
    ours, _ = apply(model, None, stack)
    for name, parameter in by_hand.model.named_parameters():
        if name in first:
            parameter.copy_(parameter.float() + first[name].diff - 0.5 * second[name].diff)
    found, wanted = sample(ours, "Wan"), sample(by_hand, "Wan")
    assert (wanted - plain).norm() > 0.01 * plain.norm()
    assert torch.equal(found, wanted)
    assert torch.equal(sample(model, "Wan"), plain)
    comfy.model_management.unload_all_models()
    after = parameters(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_one_loader_after_another_adds_up():
    model = build("Wan")
    first, second = changes(model), changes(model, seed=1)
    once, _ = apply(model, None, [Entry(first, 1.0, 1.0), Entry(second, 1.0, 1.0)])
    chained, _ = apply(model, None, [Entry(first, 1.0, 1.0)])
    sample(chained, "Wan")  # loaded, so that the parameters of the first are in the model
    chained, _ = apply(chained, None, [Entry(second, 1.0, 1.0)])
    for path in first:
        assert_close(chained.get_model_object(path), once.get_model_object(path))
