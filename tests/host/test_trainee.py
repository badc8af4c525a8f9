"""Models unloaded in the middle of training are loaded again; dynamic ones are trained plain."""

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import pytest
import torch

from lora_weave.lora_core.attach import attached
from lora_weave.lora_core.host.models import clip_layers, unet_layers
from lora_weave.lora_core.host.trainee import trainee, training_clip, training_patcher
from lora_weave.lora_core.training.protection import Gradients
from lora_weave.nodes.training_job import live_encoder

from .families import CPU, build
from .one_step import OneStep, forget, parameters_of, random_adapters
from .test_encode import patched
from .test_inplace import Snapshot, patched_clone, same, training, training_text
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


class Dynamic(comfy.model_patcher.ModelPatcher):
    """What training sees of 0.33's ModelPatcherDynamic, which itself needs an NVIDIA card."""

    @classmethod
    def of(cls, load):
        """`load` gives the model from its file: a plain patcher, each time a new one."""
        first = load()
        dynamic = cls(first.model, CPU, CPU)
        dynamic.load, dynamic.patches = load, first.patches
        return dynamic

    def is_dynamic(self):
        return True

    def clone(self, disable_dynamic=False):
        return self.load() if disable_dynamic else Dynamic.of(self.load)


class DynamicCLIP(comfy.sd.CLIP):
    """0.33's CLIP.clone: the patcher is not dynamic, `cond_stage_model` is still the old one."""

    @classmethod
    def of(cls, load):
        clip = load()
        clip.__class__ = cls
        clip.patcher = Dynamic.of(lambda: load().patcher)
        clip.cond_stage_model = clip.patcher.model
        return clip

    def clone(self, disable_dynamic=False):
        clone = super().clone()
        clone.patcher = self.patcher.clone(disable_dynamic=disable_dynamic)
        return clone


def test_a_dynamic_model_is_trained_as_a_plain_one():
    """0.33 may drop the dynamic one's weights between forward and backward."""

    def load():
        return patched_clone(build("SD3"))

    dynamic = Dynamic.of(load)
    before = Snapshot(dynamic.model)
    plain = training_patcher(dynamic, "auto")
    assert type(plain) is comfy.model_patcher.ModelPatcher and plain.model is not dynamic.model
    with training(load(), "SD3") as (_, gradients):
        expected = gradients()
    with training(plain, "SD3") as (_, gradients):
        assert same(gradients(), expected)
        assert dynamic not in comfy.model_management.loaded_models()
        assert before.changes() == []
    assert before.changes() == []
    low = training_patcher(dynamic, "bf16")
    assert type(low) is comfy.model_patcher.ModelPatcher and low.model is not dynamic.model
    assert low.get_model_object("manual_cast_dtype") == torch.bfloat16


def test_a_dynamic_text_encoder_is_trained_as_a_plain_one():
    def load():
        return patched(build_clip("SD1"))

    dynamic = DynamicCLIP.of(load)
    before = Snapshot(dynamic.cond_stage_model)
    plain = training_clip(dynamic)
    assert type(plain.patcher) is comfy.model_patcher.ModelPatcher
    assert plain.cond_stage_model is plain.patcher.model is not dynamic.cond_stage_model
    with training_text(build("SD3"), load()) as (_, gradients):
        expected = gradients()
    with training_text(build("SD3"), plain) as (_, gradients):
        assert same(gradients(), expected)
        assert dynamic.patcher not in comfy.model_management.loaded_models()
        assert before.changes() == []
    assert before.changes() == []
