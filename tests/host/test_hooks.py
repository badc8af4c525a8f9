"""LoRA Stack to Hooks gives what core's hooks give, and more types than those."""

from __future__ import annotations

from pathlib import Path

import comfy.hooks
import comfy.model_management
import comfy.sample
import comfy.utils
import folder_paths
import pytest
import torch

from lora_weave.lora_core.host.apply import apply
from lora_weave.lora_core.host.hooks import (
    StackHook,
    keyframe_group,
    stack_hooks,
)
from lora_weave.lora_core.host.models import clip_layers, key_map, unet_layers
from lora_weave.lora_core.lora_file import LoraFile
from lora_weave.lora_core.schedule import STEPS, Schedule
from lora_weave.lora_core.stack import StackEntry
from lora_weave.nodes.hooks import Hooks

from .families import build, conditioning, latent
from .test_apply import adapters_of
from .test_inplace import fp8_sd3, quantized_sd3, scaled_fp8_sd3
from .text_encoders import build_clip


@pytest.fixture(autouse=True)
def executor():
    """The host runs a node in inference mode."""
    with torch.inference_mode():
        yield
    comfy.model_management.unload_all_models()


@pytest.fixture(scope="module")
def base():
    with torch.inference_mode():
        return build("SD1.5"), build_clip("SD1")


def entry(base, name: str, kind: str, seed: int, model=1.0, clip=1.0, **more) -> StackEntry:
    """A file of one type on every layer, as a row of the stack."""
    adapters = adapters_of(kind, unet_layers(base[0]), seed)
    adapters |= adapters_of(kind, clip_layers(base[1]), seed + 100)
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    LoraFile(adapters).save(path, key_map(*base))
    return StackEntry(name, model, clip, path.name, path, **more)


def sampled(model, hooks, steps=4):
    positive = comfy.hooks.set_hooks_for_conditioning(conditioning("SD1.5", 5), hooks)
    image = latent("SD1.5", 1, seed=3)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(4))
    negative = conditioning("SD1.5", 6)
    return comfy.sample.sample(
        model, noise, steps, 2.0, "euler", "normal", positive, negative, image, seed=7
    )


def cores(one: StackEntry, schedule: str = "") -> comfy.hooks.HookGroup:
    tensors = comfy.utils.load_torch_file(str(one.path), safe_load=True)
    group = comfy.hooks.create_hook_lora(tensors, one.model, one.clip)
    if schedule:
        for hook in group.hooks:
            hook.hook_keyframe = keyframe_group(Schedule.parse(schedule))
    return group


def assert_close(found, expected):
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("schedule", ["", "0:0, 0.3:1, 1:0.5"])
def test_a_kohya_lora_equals_core_s_hook(base, schedule):
    one = entry(base, "kohya", "lora", seed=1, model=0.7)
    expected = sampled(base[0], cores(one, schedule))
    assert (expected - sampled(base[0], None)).abs().max() > 1e-2 * expected.abs().max()
    assert_close(sampled(base[0], stack_hooks([one], Schedule.parse(schedule), None)), expected)


def test_rows_and_hooks_before_them_add_up(base):
    first = entry(base, "first", "lora", seed=1, model=0.7)
    second = entry(base, "second", "loha", seed=2, model=-0.4)
    expected = sampled(base[0], cores(first).clone_and_combine(cores(second)))
    assert_close(sampled(base[0], stack_hooks([first, second], None, None)), expected)
    assert_close(sampled(base[0], stack_hooks([second], None, cores(first))), expected)


def test_the_schedule_of_a_row_is_multiplied(base):
    own, whole = Schedule.parse("0:1, 1:0"), Schedule.parse("0:0.5")
    one = entry(base, "scheduled", "lora", seed=1, schedule=own)
    (hook,) = stack_hooks([one], whole, None).hooks
    factors = [frame.strength for frame in hook.hook_keyframe.keyframes]
    assert factors == [pytest.approx(0.5 * (1 - step / STEPS)) for step in range(STEPS + 1)]
    starts = [frame.start_percent for frame in hook.hook_keyframe.keyframes]
    assert starts == [step / STEPS for step in range(STEPS + 1)]


def test_types_and_block_weights_that_core_has_not(base):
    """All steps with a constant hook equal the patched model."""
    from lora_weave.lora_core.stack import read_stack

    stack = [
        entry(base, "an_oft", "oft", seed=4, model=0.5),
        entry(base, "blocks", "lora", seed=5, model=0.8, blocks={"IN": 0.5, "OUT": 0.0}),
    ]
    read = read_stack(stack, key_map(*base))
    patched = apply(base[0], None, read)[0]
    positive = conditioning("SD1.5", 5)
    image = latent("SD1.5", 1, seed=3)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(4))

    def run(model, hooks):
        cond = comfy.hooks.set_hooks_for_conditioning(positive, hooks)
        return comfy.sample.sample(
            model, noise, 3, 1.0, "euler", "normal", cond, cond, image, seed=7
        )

    assert_close(run(base[0], stack_hooks(stack, None, None)), run(patched, None))


def test_the_text_encoder_s_hooks(base):
    """As core's Set CLIP Hooks does it."""
    _, clip = base
    one = entry(base, "text", "lora", seed=1, clip=0.8)

    def encoded(hooks):
        hooked = clip.clone()
        hooked.patcher.forced_hooks = hooks.clone()
        hooked.use_clip_schedule = False
        target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Clip)
        hooked.patcher.register_all_hook_patches(hooked.patcher.forced_hooks, target)
        return hooked.encode_from_tokens(hooked.tokenize("a red fox"))

    expected = encoded(cores(one))
    assert (expected - clip.encode_from_tokens(clip.tokenize("a red fox"))).abs().max() > 1e-3
    assert_close(encoded(stack_hooks([one], None, None)), expected)


def test_the_base_comes_back(base):
    before = {name: weight.clone() for name, weight in base[0].model.state_dict().items()}
    sampled(base[0], stack_hooks([entry(base, "back", "lora", seed=1)], None, None))
    comfy.model_management.unload_all_models()
    after = base[0].model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_a_clone_keeps_its_entry(base):
    hook = StackHook(entry(base, "cloned", "lora", seed=1, model=0.5, clip=0.25))
    other = hook.clone()
    assert other == hook and other.entry is hook.entry
    assert (other.strength_model, other.strength_clip) == (0.5, 0.25)


def hooked(model, one: StackEntry):
    """The patcher as a sampler readies it for the hooks of an entry."""
    clone = model.clone()
    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    clone.register_all_hook_patches(stack_hooks([one], None, None), target)
    return clone


@pytest.mark.parametrize("load", [quantized_sd3, scaled_fp8_sd3])
def test_quantised_models_are_sent_to_mode_live(load, base):
    model, clip = load(), base[1]
    one = entry((model, clip), "quantised", "lora", seed=1)
    with pytest.raises(ValueError, match="quantised: hooks can't change .*; .* mode live"):
        hooked(model, one)
    assert hooked(fp8_sd3(), one).hook_patches
    of_text = LoraFile(adapters_of("lora", clip_layers(clip), seed=1))
    of_text.save(one.path, key_map(None, clip))
    hooked(model, one)  # which it leaves alone


def test_the_node(base):
    one = entry(base, "node", "lora", seed=1)
    (group,) = Hooks.execute(stack=(one,), schedule="0:0, 1:1").args
    assert [hook.entry for hook in group.hooks] == [one]
    assert Hooks.validate_inputs(schedule="0:0, 1:1") is True
    assert "no point" in Hooks.validate_inputs(schedule="x")
