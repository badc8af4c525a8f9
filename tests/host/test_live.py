"""Mode live gives what patched weights give, follows schedules, and leaves no trace."""

import gc
import logging
import math
from dataclasses import replace

import comfy.model_management
import comfy.ops
import comfy.sample
import comfy.samplers
import pytest
import torch

from lora_weave.lora_core.adapters import ADAPTERS, Bias
from lora_weave.lora_core.adapters.full import Full
from lora_weave.lora_core.blocks import BlockWeights
from lora_weave.lora_core.host.apply import apply
from lora_weave.lora_core.host.identity import model_identity
from lora_weave.lora_core.host.live import FACTORS_BELOW, LiveLayer, apply_live, position_of
from lora_weave.lora_core.host.models import clip_layers, key_map, unet_layers
from lora_weave.lora_core.host.norms import unet_norms
from lora_weave.lora_core.schedule import Schedule
from lora_weave.lora_core.stack import Entry

from .families import build, conditioning, latent
from .one_step import random_adapters
from .test_apply import adapters_of
from .test_inplace import exact_weights, fp8_sd3, quantized_sd3, scaled_fp8_sd3
from .text_encoders import build_clip


@pytest.fixture(autouse=True)
def executor():
    """The host runs a node in inference mode."""
    with torch.inference_mode():
        yield
    comfy.model_management.unload_all_models()


@pytest.fixture(scope="module")
def model():
    with torch.inference_mode():
        return build("SD1.5")


def sampled(model, family="SD1.5", steps=3):
    """What the host's Euler sampler makes of fixed noise."""
    image = latent(family, 1, seed=3)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(4))
    positive, negative = conditioning(family, 5), conditioning(family, 6)
    return comfy.sample.sample(
        model, noise, steps, 2.0, "euler", "normal", positive, negative, image, seed=7
    )


def assert_close(found, expected):
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


def two(model):
    first = random_adapters(unet_layers(model), rank=3, alpha=1.5, seed=0)
    second = random_adapters(unet_layers(model), rank=9, alpha=4.0, seed=1)
    return [Entry(first, 0.7, 0.0), Entry(second, -0.4, 0.0)]


def test_equals_patched_weights(model):
    stack, base = two(model), sampled(model)
    expected = sampled(apply(model, None, stack)[0])
    assert (expected - base).abs().max() > 1e-2 * base.abs().max()
    live = apply_live(model, None, stack)[0]
    assert_close(sampled(live), expected)
    assert not live.patches


@pytest.mark.parametrize("family", ["SDXL", "SD3", "Flux", "Lumina2", "Qwen-Image", "Wan"])
def test_equals_patched_weights_of_other_families(family):
    model = build(family)
    stack = [Entry(random_adapters(unet_layers(model), rank=3, alpha=2.0, seed=0), 0.5, 0.0)]
    expected = sampled(apply(model, None, stack)[0], family)
    assert (expected - sampled(model, family)).abs().max() > 1e-3 * expected.abs().max()
    assert_close(sampled(apply_live(model, None, stack)[0], family), expected)


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_type_between_two_loras(model, name):
    first, last = two(model)
    middle = Entry(adapters_of(name, unet_layers(model), seed=7), 0.5, 0.0)
    stack = [first, middle, last]
    expected = sampled(apply(model, None, stack)[0])
    assert_close(sampled(apply_live(model, None, stack)[0]), expected)


def test_both_ways_are_taken(model):
    """Else the comparisons above would say nothing of one of them."""
    stack = two(model)
    layers = unet_layers(model).facts
    narrow = {
        LiveLayer(path, [(one, one.adapters[path]) for one in stack]).is_narrow(layer)
        for path, layer in layers.items()
    }
    assert narrow == {True, False}
    assert 0 < FACTORS_BELOW < 1


@pytest.mark.parametrize("family", ["SD1.5", "SD3", "Flux"])
def test_norms_and_biases(family):
    """Of the host's operations, and of Flux's own norms, whose weight 0.3.75 calls scale."""
    model = build(family)
    changes = {}
    for path, norm in unet_norms(model).facts.items():
        diff = torch.linspace(-1, 1, norm.shape[0])
        changes[path] = Full.from_tensors({"diff": diff}, norm.shape)
        if norm.bias() is not None:
            changes[f"{path}.bias"] = Bias.from_tensors({"diff_b": diff}, norm.shape)
    stack = [Entry(changes, 0.5, 0.0)]
    expected = sampled(apply(model, None, stack)[0], family)
    assert (expected - sampled(model, family)).abs().max() > 1e-3 * expected.abs().max()
    assert_close(sampled(apply_live(model, None, stack)[0], family), expected)


def test_text_encoder():
    clip = build_clip("SDXL")
    stack = [Entry(random_adapters(clip_layers(clip), rank=3, alpha=2.0, seed=0), 0.0, 0.8)]
    tokens = clip.tokenize("a red fox")

    def encoded(one):
        return one.encode_from_tokens(tokens)

    expected = encoded(apply(None, clip, stack)[1])
    assert (expected - encoded(clip)).abs().max() > 1e-3
    assert_close(encoded(apply_live(None, clip, stack)[1]), expected)


RANKS = {"lora": 3, "wide lora": 60}  # on outputs, and as ΔW


@pytest.mark.parametrize("load", [fp8_sd3, quantized_sd3, scaled_fp8_sd3])
@pytest.mark.parametrize("kind", [*RANKS, "loha", "lokr", "full", "oft", "glora"])
def test_quantised_bases_keep_their_weights(load, kind):
    """As a float32 model that has the rounded weights, patched."""
    model = load()
    exact, full = exact_weights(raw(model)), full_precision(model)
    if kind in RANKS:
        adapters = random_adapters(unet_layers(full), rank=RANKS[kind], alpha=2.0, seed=0)
    else:
        adapters = adapters_of(kind, unet_layers(full), seed=0)
    stack = [Entry(adapters, 0.7, 0.0)]
    live = apply_live(model, None, stack)[0]
    expected, base = sampled(apply(full, None, stack)[0], "SD3"), sampled(full, "SD3")
    change = (expected - base).abs().max()
    assert change > 5e-3 * expected.abs().max()
    assert (sampled(live, "SD3") - expected).abs().max() <= 1e-3 * change
    assert not model.backup
    after = exact_weights(raw(model))
    assert all(torch.equal(after[name], weight) for name, weight in exact.items())


def full_precision(model):
    """The float32 model that has the numbers of a quantised SD3."""
    full = build("SD3")
    full.model.diffusion_model.load_state_dict(exact_weights(raw(model)), strict=False)
    for name, buffer in full.model.diffusion_model.named_buffers():
        buffer.copy_(raw(model).get_buffer(name))
    return full


def raw(model) -> torch.nn.Module:
    return model.model.diffusion_model


@pytest.mark.parametrize("scaled", [True, False])
def test_fp8_products_stay(scaled, caplog):
    """The host multiplies in fp8 as without the change, whose product is added to the output."""
    fp8 = torch.float8_e4m3fn
    operations = comfy.ops.scaled_fp8_ops(True, False, fp8) if scaled else comfy.ops.fp8_ops
    linear = operations.Linear(32, 16, bias=False).eval()
    linear.weight = torch.nn.Parameter(torch.randn(16, 32).to(fp8), requires_grad=False)
    if scaled:
        linear.scale_weight.data.fill_(0.25)
    x = torch.randn(2, 32, dtype=torch.bfloat16)
    change = Full(torch.randn(16, 32))
    path = "diffusion_model.x"
    with caplog.at_level(logging.INFO):
        before = linear(x.clone())
        LiveLayer(path, [(Entry({path: change}, 0.5, 0.0), change)]).attach(linear)
        found = linear(x.clone())
    assert "Exception" not in caplog.text
    expected = before.float() + 0.5 * x.float() @ change.diff.t()
    assert (found - expected).abs().max() <= 2e-2 * expected.abs().max()


def test_block_weights(model):
    adapters = two(model)[0].adapters
    blocks = BlockWeights.parse({"IN": 0.0, "OUT02": 0.5, "MID": -1})
    stack = [Entry(adapters, 1.0, 0.0, blocks)]
    assert 0 < len(apply(model, None, stack)[0].patches) < len(adapters)
    expected = sampled(apply(model, None, stack)[0])
    assert_close(sampled(apply_live(model, None, stack)[0]), expected)


def test_nothing_is_left_behind(model):
    modules = dict(model.model.named_modules())
    before = {name: dict(vars(module)) for name, module in modules.items()}
    weights = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    expected = sampled(model)
    live = apply_live(model, None, two(model))[0]
    sampled(live)
    comfy.model_management.unload_all_models()
    for name, module in modules.items():
        assert not module._forward_hooks, name
        assert vars(module).keys() == before[name].keys(), name
    for name, weight in model.model.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    assert torch.equal(sampled(model), expected)


def test_a_strength_changes_without_patching(model):
    """One clone after another; no weight is written, and the first's change is gone."""
    stack = two(model)
    first = apply_live(model, None, stack)[0]
    halved = [entry.at(entry.strength_model / 2, 0.0) for entry in stack]
    second = apply_live(model, None, halved)[0]
    weights = {name: (w.data_ptr(), w.clone()) for name, w in model.model.named_parameters()}
    one, other, again = sampled(first), sampled(second), sampled(first)
    assert torch.equal(one, again)
    assert not model.backup
    for name, weight in model.model.named_parameters():
        assert weight.data_ptr() == weights[name][0]
        assert torch.equal(weight, weights[name][1])
    comfy.model_management.unload_all_models()
    assert_close(other, sampled(apply(model, None, halved)[0]))


def test_a_clone_that_is_freed_leaves_the_changes_on(model):
    """The host's clones share injections and eject them when they are freed."""
    live = apply_live(model, None, two(model))[0]
    comfy.model_management.load_models_gpu([live], force_full_load=True)

    def hooks():
        return sum(len(module._forward_hooks) for module in model.model.modules())

    attached = hooks()
    clone = live.clone()
    assert clone.is_injected and attached > 0
    del clone
    gc.collect()
    assert hooks() == attached
    comfy.model_management.unload_all_models()
    assert hooks() == 0


def test_two_live_stacks_and_a_patched_one(model):
    first, second = two(model)
    third = Entry(random_adapters(unet_layers(model), rank=2, alpha=2.0, seed=5), 0.3, 0.0)
    expected = sampled(apply(model, None, [first, second, third])[0])
    patched = apply(model, None, [first])[0]
    live = apply_live(patched, None, [second])[0]
    assert_close(sampled(apply_live(live, None, [third])[0]), expected)
    live = apply_live(apply_live(model, None, [second])[0], None, [third])[0]
    assert_close(sampled(apply(live, None, [first])[0]), expected)


MIXED = ["loha", "full", "oft", "ia3", "glora", "dora"]


def mixed(kind: str, layers, seed: int):
    if kind != "dora":
        return adapters_of(kind, layers, seed)
    found = random_adapters(layers, rank=3, alpha=6.0, seed=seed)
    for path, adapter in found.items():
        adapter.decompose(1.3 * layers.facts[path].weight())
    return found


@pytest.mark.parametrize("family", ["SD1.5", "SD3"])
@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("is_last", [True, False])
def test_live_after_live_is_one_stack(family, kind, is_last):
    """A narrow LoRA acts on outputs; what depends on the weight sees the changes before it."""
    model = build(family)
    layers = unet_layers(model)
    stack = [
        Entry(random_adapters(layers, rank=3, alpha=6.0, seed=0), 1.0, 0.0),
        Entry(mixed(kind, layers, seed=3), 0.5, 0.0),
    ]
    first, last = stack if is_last else reversed(stack)
    expected = sampled(apply(model, None, [first, last])[0], family)
    change = (expected - sampled(apply(model, None, [first])[0], family)).abs().max()
    live = apply_live(model, None, [first])[0]
    sampled(live, family)
    found = sampled(apply_live(live, None, [last])[0], family)
    assert (found - expected).abs().max() <= 1e-3 * change + 2e-5 * expected.abs().max()
    assert_close(sampled(live, family), sampled(apply(model, None, [first])[0], family))


def test_schedules_of_two_live_stacks(model):
    """Both are followed, each its own."""
    first, second = two(model)
    early, late = Schedule.parse("0:1, 0.5:0"), Schedule.parse("0:0, 1:1")
    live = apply_live(model, None, [replace(first, schedule=early)])[0]
    live = apply_live(live, None, [replace(second, schedule=late)])[0]
    sampling, x = model.get_model_object("model_sampling"), latent("SD1.5", 1, seed=3)
    for position in (0.2, 0.8):
        factors = [schedule.at(position) for schedule in (early, late)]
        changed = [
            entry.at(entry.strength_model * factor, 0.0)
            for entry, factor in zip((first, second), factors, strict=True)
        ]
        sigma = sampling.percent_to_sigma(position)
        expected = one_call(apply(model, None, changed)[0], x, sigma, "SD1.5")
        assert_close(one_call(live, x, sigma, "SD1.5"), expected)


@pytest.mark.parametrize("family", ["SD1.5", "Flux"])
def test_schedules_follow_the_sigma_of_each_step(family):
    """Each step as with patched weights of that step's strength."""
    model = build(family)
    schedule = Schedule.parse("0:0, 0.3:1, 1:0.5")
    adapters = random_adapters(unet_layers(model), rank=3, alpha=2.0, seed=0)
    live = apply_live(model, None, [Entry(adapters, 0.8, 0.0, schedule=schedule)])[0]
    sampling = model.get_model_object("model_sampling")
    x = latent(family, 1, seed=3)
    for position in (0.0, 0.15, 0.3, 0.65, 0.999):
        sigma = sampling.percent_to_sigma(max(position, 1e-6))
        strength = 0.8 * schedule.at(position)
        expected = one_call(
            apply(model, None, [Entry(adapters, strength, 0.0)])[0], x, sigma, family
        )
        assert_close(one_call(live, x, sigma, family), expected)


def one_call(model, x, sigma, family):
    """The model's prediction at a sigma, as a sampler asks for it."""

    class Once(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, *_, **__):
            return model_wrap(x, sigmas[:1], **extra_args)

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conditioning(family, 5), conditioning(family, 6))
    guider.set_cfg(1.0)
    sigmas = torch.tensor([sigma, 0.0])
    return guider.sample(torch.zeros_like(x), x, Once(), sigmas, seed=0)


def test_positions():
    for family in ("SD1.5", "Flux"):
        sampling = build(family).get_model_object("model_sampling")
        for position in (0.1, 0.37, 0.9):
            found = position_of(float(sampling.percent_to_sigma(position)), sampling)
            assert abs(found - position) < 1e-4


def test_the_identity_tells_strengths_and_not_use(model):
    stack = two(model)
    live = apply_live(model, None, stack)[0]
    before = model_identity(live)
    sampled(live)
    assert model_identity(live) == before
    other = apply_live(model, None, [stack[0], stack[1].at(0.1, 0.0)])[0]
    assert model_identity(other) != before


def test_a_layer_that_the_model_lacks(model):
    adapters = {"diffusion_model.nowhere": two(model)[0].adapters["diffusion_model.time_embed.0"]}
    with pytest.raises(ValueError, match=r"1 of 1 layer is not in the model: .*nowhere"):
        apply_live(model, None, [Entry(adapters, 1.0, 0.0)])


def test_wan_s_modulations():
    """Parameters of blocks, which the host replaces while the model is loaded."""
    model = build("Wan")
    changes = {}
    for path, layer in key_map(model, None).parameters.items():
        diff = torch.linspace(-1, 1, math.prod(layer.shape)).reshape(layer.shape)
        changes[path] = Full.from_tensors({"diff": diff}, layer.shape)
    stack = [Entry(changes, 0.5, 0.0)]
    expected = sampled(apply(model, None, stack)[0], "Wan")
    assert (expected - sampled(model, "Wan")).abs().max() > 1e-3 * expected.abs().max()
    assert_close(sampled(apply_live(model, None, stack)[0], "Wan"), expected)
    scheduled = Entry(changes, 0.5, 0.0, schedule=Schedule.parse("0:0, 1:1"))
    with pytest.raises(ValueError, match="a schedule can't change the modulations"):
        apply_live(model, None, [scheduled])
