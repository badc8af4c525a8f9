"""Applying a stack of LoRAs gives what the host's own chain of LoRA loaders gives."""

import copy
from collections.abc import Sequence

import comfy.lora
import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.weight_adapter.lora import LoRAAdapter
from torch import Tensor

from lora_weave.lora_core.adapters import ADAPTERS, Adapter, Bias
from lora_weave.lora_core.adapters.full import Full
from lora_weave.lora_core.adapters.lora import LoRA
from lora_weave.lora_core.host.apply import (
    Entry,
    StackedDelta,
    apply,
    combine,
    refuse_missing,
    stacked_patches,
)
from lora_weave.lora_core.host.models import clip_layers, key_map, unet_layers
from lora_weave.lora_core.lora_file import LoraFile

from .families import build
from .one_step import random_adapters
from .text_encoders import build_clip

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = [str(dtype).removeprefix("torch.") for dtype in DTYPES]


@pytest.fixture(autouse=True)
def executor():
    """The host runs a node in inference mode."""
    with torch.inference_mode():
        yield
    comfy.model_management.unload_all_models()


@pytest.fixture(scope="module", params=DTYPES, ids=IDS)
def base(request):
    """(model, clip), whose layers are linear and convolutions."""
    with torch.inference_mode():
        return build("SD1.5", dtype=request.param), build_clip("SDXL", dtype=request.param)


def loras(model, clip, count: int) -> list[dict[str, Adapter]]:
    """LoRAs of several ranks and scales on every layer."""
    made = []
    for seed in range(count):
        options = {"rank": 3 + seed, "alpha": 1.5 + seed, "seed": seed}
        unet = random_adapters(unet_layers(model), **options)
        made.append(unet | random_adapters(clip_layers(clip), **options))
    return made


def hosts_chain(model, clip, stack):
    """The host's LoraLoader for one entry after another."""
    for entry in stack:
        tensors = LoraFile(dict(entry.adapters)).to_generic()
        model, clip = comfy.sd.load_lora_for_models(
            model, clip, tensors, entry.strength_model, entry.strength_clip
        )
    return model, clip


def patched_weights(*patchers) -> dict[str, Tensor]:
    """Copies of all weights with the patches in them, as the host loads them."""
    comfy.model_management.load_models_gpu(patchers, force_full_load=True)
    return {name: p.clone() for one in patchers for name, p in one.model.named_parameters()}


def assert_same_but_for_rounding(found: dict[str, Tensor], expected: dict[str, Tensor]):
    """float32: sums in another order. Else: both are such a sum, rounded to a neighbour at most."""
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype
        error = (found[name].double() - weight.double()).abs()
        allowed = 5e-7 * weight.double().abs().max() + torch.zeros_like(error)
        if weight.dtype != torch.float32:
            limits = torch.finfo(weight.dtype)
            allowed += limits.eps * weight.double().abs().clamp(min=limits.smallest_normal)
        assert (error <= allowed).all(), name


def changed(found: dict[str, Tensor], base: dict[str, Tensor]) -> set[str]:
    return {name for name, weight in base.items() if not torch.equal(weight, found[name])}


@pytest.mark.parametrize(
    "strengths", [(0.0, 0.0), (0.5, 1.0), (1.0, 0.0), (-1.0, 2.0), (2.0, -0.5)]
)
def test_one_lora(base, strengths):
    model, clip = base
    stack = [Entry(loras(model, clip, 1)[0], *strengths)]
    before = patched_weights(model, clip.patcher)
    ours, our_clip = apply(model, clip, stack)
    found = patched_weights(ours, our_clip.patcher)
    theirs, their_clip = hosts_chain(model, clip, stack)
    assert_same_but_for_rounding(found, patched_weights(theirs, their_clip.patcher))
    unet, text = (len(layers.facts) for layers in (unet_layers(model), clip_layers(clip)))
    expected = (unet if strengths[0] else 0) + (text if strengths[1] else 0)
    assert len(changed(found, before)) == expected
    assert len(ours.patches) + len(our_clip.patcher.patches) == expected


def test_several_loras(base):
    model, clip = base
    first, second, third = loras(model, clip, 3)
    stack = [Entry(first, 0.7, 0.2), Entry(second, -0.4, 1.0), Entry(third, 1.3, -0.6)]
    ours, our_clip = apply(model, clip, stack)
    assert all(len(patches) == 1 for patches in ours.patches.values())
    found = patched_weights(ours, our_clip.patcher)
    theirs, their_clip = hosts_chain(model, clip, stack)
    assert_same_but_for_rounding(found, patched_weights(theirs, their_clip.patcher))


def adapters_of(name: str, layers, seed: int, ranks: Sequence[int] = (4,)) -> dict[str, Adapter]:
    """One of a registered type on every layer, of the ranks in turn, filled with numbers."""
    made = {}
    for index, (path, layer) in enumerate(layers.facts.items()):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        rank = ranks[(seed + index) % len(ranks)]
        adapter = ADAPTERS[name].create(layer.shape, rank, 2.0, generator=generator)
        for parameter in adapter.parameters():
            parameter.data.normal_(0.0, 0.1, generator=generator)
        made[path] = adapter
    return made


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_type_in_the_stack_s_order(base, name):
    """Against W + s · ΔW(W) in float64 after one another, between two LoRAs."""
    model, clip = base
    layers = unet_layers(model)
    first, last = loras(model, clip, 2)
    middle = adapters_of(name, layers, seed=7)
    stack = [Entry(first, 0.7, 0.0), Entry(middle, 0.5, 0.0), Entry(last, -0.4, 0.0)]
    before = patched_weights(model)
    found = patched_weights(apply(model, None, stack)[0])
    for path in layers.facts:
        expected = before[f"{path}.weight"].double()
        for entry in stack:
            adapter = copy.deepcopy(entry.adapters[path]).double()
            expected = expected + entry.strength_model * adapter.delta(expected).detach()
        error = (found[f"{path}.weight"].double() - expected).abs().max()
        eps = torch.finfo(found[f"{path}.weight"].dtype).eps
        assert error <= max(eps, 1e-6) * expected.abs().max(), path


def test_a_patch_of_a_lokr_holds_its_blocks():
    """Not factors of full rank, which are larger than ΔW."""
    blocks = {"lokr_w1": torch.randn(4, 4), "lokr_w2": torch.randn(60, 30)}
    adapter = ADAPTERS["lokr"].from_tensors(blocks, (240, 120))
    ((kind, *_, tensors),) = combine([(1.0, adapter)])
    assert kind == "lokr"
    assert sum(tensor.numel() for tensor in tensors) == 4 * 4 + 60 * 30 + 1  # and alpha


def test_norms_and_biases(base):
    """A diff of each, between two LoRAs, as a `full` file brings them."""
    model, _ = base
    before = patched_weights(model)
    norm, bias = "diffusion_model.input_blocks.1.0.in_layers.0", "diffusion_model.out.2.bias"
    shapes = {norm: before[f"{norm}.weight"].shape, bias: before[bias].shape}
    changes = {
        norm: Full.from_tensors({"diff": torch.linspace(-1, 1, shapes[norm][0])}, shapes[norm]),
        bias: Bias.from_tensors({"diff_b": torch.ones(shapes[bias])}, shapes[bias]),
    }
    stack = [Entry(changes, 0.5, 0.0), Entry(changes, 0.25, 0.0)]
    found = patched_weights(apply(model, None, stack)[0])
    assert changed(found, before) == {f"{norm}.weight", bias}
    for name, path in ((f"{norm}.weight", norm), (bias, bias)):
        expected = before[name].double() + 0.75 * changes[path].delta(before[name].float()).double()
        eps = torch.finfo(found[name].dtype).eps
        assert (found[name].double() - expected).abs().max() <= eps * expected.abs().max()


def test_norms_that_call_their_weight_scale():
    """Flux's in 0.3.75."""
    model = build("Flux2")
    before = patched_weights(model)
    name = "diffusion_model.double_blocks.1.txt_attn.norm.key_norm"
    path = key_map(model, None).find(name).path
    key = next(key for key in before if key.startswith(name))
    diff = torch.linspace(-1, 1, len(before[key]))
    change = {path: Full.from_tensors({"diff": diff}, tuple(diff.shape))}
    found = patched_weights(apply(model, None, [Entry(change, 0.5, 0.0)])[0])
    assert changed(found, before) == {key}
    torch.testing.assert_close(found[key], before[key] + 0.5 * diff)


def test_dora_is_applied_to_the_running_weight(base):
    """Its norm is that of the weight which the LoRA before it has changed, at any strength."""
    model, clip = base
    layers = unet_layers(model)
    (first,) = loras(model, clip, 1)
    second = {}
    for path, layer in layers.facts.items():
        lora = LoRA.create(layer.shape, 3, 3.0, generator=torch.Generator().manual_seed(1))
        lora.up.data.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(2))
        lora.decompose(layer.weight())
        lora.magnitude.data.mul_(1.1)
        second[path] = lora
    stack = [Entry(first, 0.6, 0.0), Entry(second, 0.5, 0.0)]
    before = patched_weights(model)
    found = patched_weights(apply(model, None, stack)[0])
    for path in layers.facts:
        weight = before[f"{path}.weight"].double()
        weight = weight + 0.6 * copy.deepcopy(first[path]).double().delta(weight)
        lora = copy.deepcopy(second[path]).double()
        up, down = lora.change_factors()
        changed = weight + (up @ down).reshape(weight.shape)
        norm = changed.flatten(1).norm(dim=1).reshape(lora.magnitude.shape)
        expected = weight + 0.5 * (lora.magnitude * changed / norm - weight)
        error = (found[f"{path}.weight"].double() - expected.detach()).abs().max()
        eps = torch.finfo(found[f"{path}.weight"].dtype).eps
        assert error <= max(eps, 1e-6) * expected.abs().max(), path


def test_the_base_comes_back(base):
    model, clip = base
    before = patched_weights(model, clip.patcher)
    ours, our_clip = apply(model, clip, [Entry(loras(model, clip, 1)[0], 1.0, 1.0)])
    assert changed(patched_weights(ours, our_clip.patcher), before)
    assert not changed(patched_weights(model, clip.patcher), before)
    patched_weights(ours, our_clip.patcher)
    comfy.model_management.unload_all_models()
    after = dict(model.model.named_parameters()) | dict(clip.patcher.model.named_parameters())
    assert not changed(after, before)
    assert not model.patches and not clip.patcher.patches


def foreign_patches(patcher, seed: int, patch=lambda tensor: ("diff", (tensor,))):
    """Another pack's patches: a dense change of every weight."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{path}.weight": patch(0.05 * torch.randn(layer.shape, generator=generator))
        for path, layer in unet_layers(patcher).facts.items()
    }


@pytest.mark.parametrize("place", ["before", "after", "around"])
def test_other_packs_patches_keep_their_place(base, place):
    """These halve what is there, or replace it, so that the order shows."""
    model, clip = base
    stack = [Entry(lora, 0.8, 0.0) for lora in loras(model, clip, 2)]

    def build_up(add_loras):
        patcher = model.clone()
        if place != "after":
            patcher.add_patches(foreign_patches(patcher, 1, lambda t: ("set", (t,))))
        patcher = add_loras(patcher)
        if place != "before":
            patcher.add_patches(foreign_patches(patcher, 2), 0.3, strength_model=0.5)
        return patched_weights(patcher)

    found = build_up(lambda patcher: apply(patcher, None, stack)[0])
    expected = build_up(lambda patcher: hosts_chain(patcher, None, stack)[0])
    assert_same_but_for_rounding(found, expected)


def streamed(value):
    """As 0.33 does it: lists and tuples are looked into, tensors copied, all else kept."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, (list, tuple)):
        return type(value)(streamed(part) for part in value)
    return value


def test_rebuilding_as_the_host_streams_gives_the_same(base):
    """0.33 makes adapters anew from `loaded_keys` and `weights` (comfy/lora.py:504)."""
    model, clip = base
    stack = [Entry(lora, 0.8, 0.3) for lora in loras(model, clip, 2)]
    stack.append(Entry(adapters_of("loha", unet_layers(model), seed=1), 0.5, 0.0))
    patches = stacked_patches(stack, "diffusion_model.")
    weights = patched_weights(model)
    for key, patch in patches.items():
        again = type(patch)(patch.loaded_keys, streamed(patch.weights))
        arguments = (key, 0.9, 1.0, None, lambda a: a)
        found = again.calculate_weight(weights[key].clone(), *arguments)
        assert torch.equal(found, patch.calculate_weight(weights[key].clone(), *arguments))


ROWS = {"q": (0, 0, 128), "k": (0, 128, 128), "columns": (1, 32, 64)}  # of a fused q/k/v


@pytest.mark.parametrize("function", [None, lambda a: a.flip(0)], ids=["", "function"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_a_slice_of_a_weight(dtype, rows, function):
    """Keys may be (key, (axis, start, length), function), and the host then expects a write."""
    model = build("SD3", dtype=dtype)
    path = "diffusion_model.joint_blocks.0.x_block.attn.qkv"
    shape = list(unet_layers(model).facts[path].shape)
    axis, _, shape[axis] = ROWS[rows]
    lora = LoRA.create(tuple(shape), 4, 2.0)
    lora.up.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    key = (f"{path}.weight", ROWS[rows]) + ((function,) if function else ())
    ours, theirs = model.clone(), model.clone()
    entry = Entry({path: lora}, 1.0, 1.0)
    patch = next(iter(stacked_patches([entry], "diffusion").values()))
    ours.add_patches({key: patch}, 0.6)
    weights = (lora.up.data, lora.down.data, lora.alpha, None, None, None)
    theirs.add_patches({key: LoRAAdapter({"x"}, weights)}, 0.6)
    before = patched_weights(model)
    found, expected = patched_weights(ours), patched_weights(theirs)
    assert changed(expected, before) == {f"{path}.weight"}
    assert_same_but_for_rounding(found, expected)


@pytest.mark.parametrize(
    "missing, total, text",
    [
        (["a"], 1, "1 of 1 layer is not in the model: a"),
        (["a"], 2, "1 of 2 layers is not in the model: a"),
        (["a", "b"], 3, "2 of 3 layers are not in the model: a, b"),
    ],
)
def test_missing_layers_are_told_in_good_grammar(missing, total, text):
    with pytest.raises(ValueError, match=f"^{text}$"):
        refuse_missing(missing, total)


def test_an_unknown_layer_is_an_error(base):
    model, clip = base
    lora = LoRA.create((4, 4), 2, 2.0)
    adapters = {"diffusion_model.nowhere": lora, **loras(model, clip, 1)[0]}
    with pytest.raises(ValueError, match="1 of .* layers is not in the model: .*nowhere"):
        apply(model, None, [Entry(adapters, 1.0, 1.0)])
    assert not model.patches


def test_only_one_of_model_and_clip(base):
    model, clip = base
    entry = Entry(loras(model, clip, 1)[0], 1.0, 1.0)
    ours, nothing = apply(model, None, [entry])
    assert nothing is None and len(ours.patches) == len(unet_layers(model).facts)
    nothing, our_clip = apply(None, clip, [entry])
    assert nothing is None and len(our_clip.patcher.patches) == len(clip_layers(clip).facts)
    assert our_clip is not clip and not clip.patcher.patches
    assert all(isinstance(p[0][1], StackedDelta) for p in our_clip.patcher.patches.values())
