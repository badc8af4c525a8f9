"""Training on the live module copies nothing, and leaves every tensor and attribute as it was."""

import json
from contextlib import contextmanager, nullcontext

import comfy.lora
import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from torch import nn

from lora_weave.lora_core.attach import attached
from lora_weave.lora_core.host.encode import encode_caption
from lora_weave.lora_core.host.inplace import alias_of, in_place
from lora_weave.lora_core.host.models import clip_layers, unet_layers
from lora_weave.lora_core.host.trainee import (
    COMPUTE_DTYPES,
    compute_dtype,
    trainee,
    training_patcher,
)
from lora_weave.lora_core.training.protection import Gradients
from lora_weave.lora_core.training.recompute import recomputed, repeated_blocks

from .families import build
from .one_step import OneStep, forget, parameters_of, random_adapters, sample
from .text_encoders import build_clip

FAMILIES = ["SD1.5", "SDXL", "SD3", "Flux"]


def data_of(tensor):
    return tensor._qdata if isinstance(tensor, QuantizedTensor) else tensor


def bits(tensor):
    return data_of(tensor).detach().reshape(-1).view(torch.uint8).clone()


class Snapshot:
    """Every object that a module tree holds, with the pointers and bits of its tensors."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.objects = dict(self._walk())
        tensors = {k: v for k, v in self.objects.items() if isinstance(v, torch.Tensor)}
        self.pointers = {name: data_of(tensor).data_ptr() for name, tensor in tensors.items()}
        self.bits = {name: bits(tensor) for name, tensor in tensors.items()}

    def _walk(self):
        for path, module in self.root.named_modules():
            yield f"{path}.__class__", type(module)
            for name, value in vars(module).items():
                parts = value.items() if isinstance(value, dict) else ()
                parts = enumerate(value) if isinstance(value, list) else parts
                for key, part in parts:
                    yield f"{path}.{name}[{key}]", part
                if not isinstance(value, (dict, list)):
                    yield f"{path}.{name}", value

    def changes(self) -> list[str]:
        """What is not the very same as at the time of the snapshot."""
        now = dict(self._walk())
        changed = sorted(set(now) ^ set(self.objects))
        for name in set(now) & set(self.objects):
            was, value = self.objects[name], now[name]
            plain = isinstance(value, (int, float, str, torch.Size))
            if value is not was and not (plain and type(value) is type(was) and value == was):
                changed.append(name)
        return changed + self.changed_bits(pointers=True)

    def changed_bits(self, pointers: bool = False) -> list[str]:
        now = dict(self._walk())
        return [
            f"bits of {name}"
            for name, was in self.bits.items()
            if not torch.equal(bits(now[name]), was)
            or (pointers and data_of(now[name]).data_ptr() != self.pointers[name])
        ]


@contextmanager
def adapted(layers, backward):
    """A function that computes {factor name: gradient}, with adapters attached to the layers."""
    adapters = random_adapters(layers)
    factors = parameters_of(adapters)
    computer = Gradients()

    def gradients():
        forget(factors.values())
        computer.compute(backward, lambda: forget(factors.values()))
        return {name: p.grad.clone() for name, p in factors.items() if p.grad is not None}

    with attached(layers.modules, adapters, layers.facts):
        yield gradients


@contextmanager
def training(patcher, family):
    """(live modules, the function of `adapted`) for a MODEL."""
    with trainee(patcher) as live:
        step = OneStep.of(patcher, family)
        with adapted(unet_layers(patcher), step.backward) as gradients:
            yield live, gradients


@contextmanager
def training_text(patcher, clip):
    """(live modules, the function of `adapted`) for a CLIP beside its MODEL."""

    def backward():
        loss = encode_caption(clip, "a photo")[0][0].square().mean()
        loss.backward()
        return loss.detach()

    with trainee(patcher, clip) as live, adapted(clip_layers(clip), backward) as gradients:
        yield live, gradients


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(g, second[n]) for n, g in first.items()
    )


@pytest.fixture(autouse=True)
def executor():
    """The host runs a node in inference mode, and may have models of earlier prompts loaded."""
    with torch.inference_mode():
        yield
    comfy.model_management.unload_all_models()


EARLY_ENDS = {
    "error": ZeroDivisionError,
    "interrupt": comfy.model_management.InterruptProcessingException,
}
every_ending = pytest.mark.parametrize("ending", ["plain", *EARLY_ENDS, "recomputed", "sampling"])


def train_and_end(ending, live, gradients, blocks, use):
    """Compute gradients, then what the ending says; `use` runs the models as a graph does."""
    first = gradients()
    assert first and all(grad.isfinite().all() for grad in first.values())
    if ending == "error":
        raise ZeroDivisionError
    if ending == "interrupt":  # any of the host's layers may raise it
        comfy.model_management.interrupt_current_processing()
        gradients()
    if ending == "recomputed":
        assert blocks
        with recomputed(blocks):
            gradients()
    if ending == "sampling":
        use()
        live.refresh()
        assert same(gradients(), first)


def expected_end(ending):
    return pytest.raises(EARLY_ENDS[ending]) if ending in EARLY_ENDS else nullcontext()


@every_ending
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_as_before(family, ending):
    patcher = build(family)
    image = sample(patcher, family)
    before = Snapshot(patcher.model)
    assert all(p.is_inference() for p in patcher.model.parameters())

    def use():
        assert not torch.equal(sample(patcher, family), image)  # adapters are on

    with expected_end(ending), training(patcher, family) as (live, gradients):
        blocks = repeated_blocks(patcher.model.diffusion_model)
        train_and_end(ending, live, gradients, blocks, use)
    assert before.changes() == []
    assert torch.equal(sample(patcher, family), image)
    assert before.changes() == []


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_copied(family):
    patcher = build(family)
    sample(patcher, family)
    before = Snapshot(patcher.model)
    with trainee(patcher) as live:
        during = Snapshot(patcher.model)
        assert during.pointers == before.pointers
        live.refresh()
        assert Snapshot(patcher.model).changes() == during.changes() == []
        for name, tensor in during.objects.items():
            if isinstance(tensor, torch.Tensor):
                was = before.objects[name]
                assert not tensor.is_inference() and not tensor.requires_grad
                assert type(tensor) is type(was)
                assert (tensor.shape, tensor.stride()) == (was.shape, was.stride())
                assert tensor.untyped_storage().data_ptr() == was.untyped_storage().data_ptr()


def quantized_sd3():
    """SD3 as the host loads a file whose joint blocks are stored in scaled fp8."""
    network = build("SD3", inference=False).model.diffusion_model
    state, formats = {}, {}
    for name, tensor in network.state_dict().items():
        if name.startswith("joint_blocks") and name.endswith(".weight") and tensor.ndim == 2:
            scale = tensor.abs().amax() / torch.finfo(torch.float8_e4m3fn).max
            state[name] = (tensor / scale).to(torch.float8_e4m3fn)
            state[f"{name}_scale"] = scale
            formats[name.removesuffix(".weight")] = {"format": "float8_e4m3fn"}
        else:
            state[name] = tensor
    metadata = {"_quantization_metadata": json.dumps({"layers": formats})}
    return comfy.sd.load_diffusion_model_state_dict(state, metadata=metadata)


def scaled_fp8_sd3():
    """SD3 as the host loads a file with a `scaled_fp8` key, whose scales its operations apply."""
    state = build("SD3", inference=False).model.diffusion_model.state_dict()
    for name, tensor in list(state.items()):
        if name.endswith(".weight") and tensor.ndim == 2:
            scale = tensor.abs().amax() / torch.finfo(torch.float8_e4m3fn).max
            state[name] = (tensor / scale).to(torch.float8_e4m3fn)
            state[f"{name.removesuffix('.weight')}.scale_weight"] = scale
    state["scaled_fp8"] = torch.tensor([], dtype=torch.float8_e4m3fn)
    return comfy.sd.load_diffusion_model_state_dict(state)


def exact_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """The numbers that a network's parameters stand for, by name, in float32; copies."""
    exact = {}
    for name, tensor in network.named_parameters():
        if not name.endswith(("scale_weight", "scale_input")):
            owner, _, own = name.rpartition(".")
            scale = getattr(network.get_submodule(owner), "scale_weight", None)
            plain = tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor.float()
            exact[name] = plain * scale if scale is not None and own == "weight" else plain.clone()
    return exact


def fp8_sd3():
    """SD3 as UNETLoader loads it with weight_dtype fp8_e4m3fn."""
    state = build("SD3", inference=False).model.diffusion_model.state_dict()
    options = {"dtype": torch.float8_e4m3fn}
    return comfy.sd.load_diffusion_model_state_dict(state, model_options=options)


@pytest.mark.parametrize("load", [fp8_sd3, quantized_sd3, scaled_fp8_sd3])
def test_fp8_bases_train_in_place(load):
    """Their gradients are those of a float32 model that has the rounded weights."""
    patcher = load()
    image = sample(patcher, "SD3")
    before = Snapshot(patcher.model)
    low = [p for p in patcher.model.parameters() if data_of(p).dtype == torch.float8_e4m3fn]
    assert len(low) > 15 and compute_dtype(patcher) == torch.float32
    with training(patcher, "SD3") as (live, gradients):
        found = gradients()
        sample(patcher, "SD3")
        live.refresh()
        assert same(gradients(), found)
        assert Snapshot(patcher.model).pointers == before.pointers
        exact = exact_weights(patcher.model.diffusion_model)
    assert before.changes() == []
    assert torch.equal(sample(patcher, "SD3"), image)
    full = build("SD3")
    full.model.diffusion_model.load_state_dict(exact, strict=False)
    for name, buffer in full.model.diffusion_model.named_buffers():
        buffer.copy_(patcher.model.diffusion_model.get_buffer(name))
    with training(full, "SD3") as (_, gradients):
        expected = gradients()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm()  # observed: 0 and 4e-7


@pytest.mark.parametrize("load", [quantized_sd3, scaled_fp8_sd3])
def test_base_weight_dequantises(load):
    layers = unet_layers(load())
    full = build("SD3", inference=False).model
    quantised = 0
    for path, layer in layers.facts.items():
        weight, module = layer.weight(), layers.modules[path]
        assert weight.dtype == torch.float32 and type(weight) in (torch.Tensor, nn.Parameter)
        assert tuple(weight.shape) == layer.shape
        expected = full.get_submodule(path).weight
        if data_of(module.weight).dtype == torch.float8_e4m3fn:
            quantised += 1
            scale = expected.abs().amax() / torch.finfo(torch.float8_e4m3fn).max
            expected = (expected / scale).to(torch.float8_e4m3fn).float() * scale
        assert torch.equal(weight, expected)
    assert quantised > 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_base_weight_of_low_precision(dtype):
    layers = unet_layers(build("SD3", dtype=dtype, inference=False))
    full = build("SD3", inference=False).model
    for path, layer in layers.facts.items():
        assert torch.equal(layer.weight(), full.get_submodule(path).weight.to(dtype).float())


def patched_clone(patcher, strength=0.7):
    """A clone with a LoRA of its own on every layer, as the host's loader makes it."""
    layers = unet_layers(patcher)
    names = {path: f"{path}.weight" for path in layers.facts}
    tensors = {
        f"{path}.{name}": tensor
        for path, adapter in random_adapters(layers, seed=9).items()
        for name, tensor in adapter.tensors().items()
    }
    clone = patcher.clone()
    clone.add_patches(comfy.lora.load_lora(tensors, names), strength)
    return clone


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patched_model_trains_on_top(family):
    """The frozen weights are then the patched ones, and the patches still come off afterwards."""
    patcher = build(family)
    image = sample(patcher, family)
    base = Snapshot(patcher.model)
    clone = patched_clone(patcher)
    patched_image = sample(clone, family)
    assert len(base.changed_bits()) > 10
    with training(patcher, family) as (_, gradients):
        unpatched_gradients = gradients()
    sample(clone, family)
    patched = Snapshot(clone.model)
    with training(clone, family) as (_, gradients):
        assert not same(gradients(), unpatched_gradients)
        assert patched.changed_bits(pointers=True) == []
    assert patched.changes() == []
    assert torch.equal(sample(clone, family), patched_image)
    assert torch.equal(sample(patcher, family), image)
    assert base.changed_bits(pointers=True) == []


@pytest.mark.parametrize("trained", ["base", "patched"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_host_loads_other_models_in_the_middle(family, trained):
    """It unloads ours, or patches and unpatches it for a clone: `refresh` loads ours again."""
    patcher = build(family)
    image = sample(patcher, family)
    base = Snapshot(patcher.model)
    clone = patched_clone(patcher)
    patched_image = sample(clone, family)
    ours, other = (patcher, clone) if trained == "base" else (clone, patcher)
    ours_image = sample(ours, family)
    before = Snapshot(ours.model)
    with training(ours, family) as (live, gradients):
        first = gradients()
        for interlude in (comfy.model_management.unload_all_models, lambda: sample(other, family)):
            with torch.inference_mode():
                interlude()
            live.refresh()
            assert same(gradients(), first)
    assert before.changed_bits() == []
    # Parameters that the host has put there meanwhile stay; nothing else is new.
    assert [change for change in before.changes() if "_parameters[" not in change] == []
    assert torch.equal(sample(ours, family), ours_image)
    assert torch.equal(sample(clone, family), patched_image)
    assert torch.equal(sample(patcher, family), image)
    assert base.changed_bits(pointers=True) == []


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_another_precision_leaves_the_model_as_it_was(family, precision):
    patcher = build(family)
    image = sample(patcher, family)
    before = Snapshot(patcher.model)
    clone = training_patcher(patcher, precision)
    assert clone is not patcher and clone.model is patcher.model
    with training(clone, family) as (_, gradients):
        layers = list(unet_layers(clone).modules.values())
        seen = set()
        hooks = [m.register_forward_hook(lambda m, x, out: seen.add(out.dtype)) for m in layers]
        found = gradients()
        assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in found.values())
        assert seen == {COMPUTE_DTYPES[precision]}
        for hook in hooks:
            hook.remove()
    assert torch.equal(sample(patcher, family), image)
    assert before.changes() == []
    assert torch.equal(sample(patcher, family), image)
    assert before.changes() == []


def test_the_models_own_precision_needs_no_clone():
    patcher = build("SD3", dtype=torch.bfloat16)
    assert training_patcher(patcher, "auto") is patcher
    assert training_patcher(patcher, "bf16") is patcher
    assert training_patcher(patcher, "fp32") is not patcher


@every_ending
@pytest.mark.parametrize("name", ["SD1", "SDXL"])
def test_the_text_encoder_is_as_before(name, ending):
    clip, patcher = build_clip(name), build("SD3")
    entry = encode_caption(clip, "a photo")[0]
    before = Snapshot(clip.cond_stage_model)
    assert all(p.is_inference() for p in clip.cond_stage_model.parameters())

    def use():
        with torch.inference_mode():
            other = encode_caption(clip, "a photo")[0]
        assert not torch.equal(other[0], entry[0])  # adapters are on
        sample(patcher, "SD3")

    with expected_end(ending), training_text(patcher, clip) as (live, gradients):
        assert len(gradients()) > 20
        train_and_end(ending, live, gradients, repeated_blocks(clip.patcher.model), use)
        assert Snapshot(clip.cond_stage_model).pointers == before.pointers
    assert before.changes() == []
    again = encode_caption(clip, "a photo")[0]
    assert torch.equal(again[0], entry[0])
    assert torch.equal(again[1]["pooled_output"], entry[1]["pooled_output"])
    assert before.changes() == []


def test_aliases():
    shared = nn.Parameter(torch.randn(4, 6), requires_grad=False)
    shared.note = "kept"
    model = nn.ModuleList([nn.Linear(6, 4), nn.Linear(6, 4)])
    model[0].weight = model[1].weight = shared
    model[0].register_buffer("view", torch.randn(8, 6)[1::2, ::2])
    model[1].plain = torch.randn(3)
    with pytest.raises(RuntimeError, match="inference mode"):
        alias_of(shared)
    before = Snapshot(model)
    with torch.inference_mode(False), in_place(model) as live:
        alias = model[0].weight
        assert alias is model[1].weight and alias is not shared
        assert isinstance(alias, nn.Parameter) and not alias.requires_grad and alias.note == "kept"
        assert not model[0].view.is_inference() and not model[1].plain.is_inference()
        assert model[0].view.stride() == before.objects["0._buffers[view]"].stride()
        with torch.no_grad():
            alias.zero_()
        new = nn.Parameter(torch.ones(4), requires_grad=False)
        model[0].bias = new
        live.refresh()
    assert not shared.any()  # one memory
    assert model[0].weight is model[1].weight is shared
    assert model[0].bias is new  # replaced by someone else meanwhile, and so left to them


def test_the_training_flag_is_put_back():
    """0.33's kernels have no backward unless it is up; 0.3.75 has no flag."""
    flag = "in_training"
    before = getattr(comfy.model_management, flag, None)
    with trainee(build("SD3")):
        assert getattr(comfy.model_management, flag, None) is (None if before is None else True)
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert getattr(comfy.model_management, flag, None) is before
    assert torch.is_inference_mode_enabled()
