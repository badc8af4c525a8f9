"""Models unloaded in the middle of training are loaded again; dynamic ones are trained plain."""

import comfy.model_management
import pytest
import torch

from lora_weave.lora_core.attach import attached
from lora_weave.lora_core.host.models import clip_layers, unet_layers
from lora_weave.lora_core.host.trainee import trainee
from lora_weave.lora_core.training.recompute import Gradients
from lora_weave.nodes.training_job import live_encoder

from .families import build
from .one_step import OneStep, forget, parameters_of, random_adapters
from .test_encode import patched
from .test_inplace import patched_clone, same
from .text_encoders import build_clip


@pytest.fixture(autouse=True)
def executor():
    """As in a node: in inference mode."""
    with torch.inference_mode():
        yield
    comfy.model_management.unload_all_models()


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_host_unloads_while_a_caption_is_encoded(when, monkeypatch):
    """As it does when memory is short; both models are patched, so that unloading changes them."""
    patcher, clip = patched_clone(build("SD3")), patched(build_clip("SD1"))
    encode, management = clip.encode_from_tokens, comfy.model_management
    unloads, loads = [], []

    def unloading(*args, **kwargs):
        if unloads and when == "before":
            unloads.pop()()
        result = encode(*args, **kwargs)
        if unloads:
            unloads.pop()()
        return result

    with trainee(patcher, clip) as live:
        layers = unet_layers(patcher) | clip_layers(clip)
        adapters = random_adapters(layers)
        factors = parameters_of(adapters)
        step = OneStep.of(patcher, "SD3")
        monkeypatch.setattr(clip, "encode_from_tokens", unloading)
        encode_live = live_encoder(clip, live)

        def gradients():
            forget(factors.values())

            def backward():
                loss = encode_live("a photo")[0][0].square().mean() + step.loss()
                loss.backward()
                return loss

            Gradients().compute(backward, lambda: forget(factors.values()))
            return {name: p.grad.clone() for name, p in factors.items() if p.grad is not None}

        with attached(layers.modules, adapters, layers.facts):
            first = gradients()
            assert len({name.split(".")[0] for name in first}) == 2
            unloads.append(management.unload_all_models)
            assert same(gradients(), first) and not unloads
            assert {patcher, clip.patcher} <= set(management.loaded_models())
            load = patcher.partially_load
            monkeypatch.setattr(patcher, "partially_load", lambda *a, **k: loads.append(load(*a)))
            assert same(gradients(), first)
            assert not loads  # nothing was unloaded, so nothing is loaded again
