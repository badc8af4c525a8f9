"""Norms and biases of the host's models and text encoders: known, trained, written and applied."""

from __future__ import annotations

import comfy.lora
import comfy.model_management
import comfy.sd
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_weave.lora_core.adapters import Adapter, Bias, adapter_type
from lora_weave.lora_core.adapters.full import Full
from lora_weave.lora_core.attach import attached
from lora_weave.lora_core.host.apply import Entry, apply
from lora_weave.lora_core.host.encode import encode_caption
from lora_weave.lora_core.host.models import ModelLayers, clip_layers, key_map, unet_layers
from lora_weave.lora_core.host.norms import clip_norms, norm_facts, unet_norms
from lora_weave.lora_core.host.trainee import trainee, training_patcher
from lora_weave.lora_core.lora_file import LoraFile
from lora_weave.lora_core.training.protection import Gradients
from lora_weave.lora_core.training.recompute import recomputed, repeated_blocks

from .families import FAMILIES, build
from .one_step import OneStep, forget, sample
from .test_inplace import Snapshot
from .text_encoders import TARGETS, build_clip

NORM_INPUTS = {"LayerNorm": (2, 5), "GroupNorm": (2,), "RMSNorm": (2, 2, 3), "T5LayerNorm": (2, 5)}


@pytest.fixture(autouse=True)
def unloaded():
    yield
    comfy.model_management.unload_all_models()


def norms_of(name: str) -> tuple[nn.Module, ModelLayers, set[str]]:
    """(root, norms that can be trained, paths of all that a file can name)."""
    if name in FAMILIES:
        patcher = build(name, inference=False)
        return patcher.model, unet_norms(patcher), set(key_map(patcher, None).norms)
    with torch.inference_mode(False):
        clip = build_clip(name[5:])
    return clip.cond_stage_model, clip_norms(clip), set(key_map(None, clip).norms)


def probe(module: nn.Module, width: int, dtype: torch.dtype) -> torch.Tensor:
    """An input far from normal, of as many axes as the host gives to such a norm."""
    leading = NORM_INPUTS[_kind(module)]
    shape = (*leading, width, 3, 4) if isinstance(module, nn.GroupNorm) else (*leading, width)
    generator = torch.Generator().manual_seed(0)
    return (0.5 + 2.0 * torch.randn(shape, generator=generator)).to(dtype)


def _kind(module: nn.Module) -> str:
    return next(name for name in NORM_INPUTS if name == type(module).__name__)


@pytest.mark.parametrize("name", [*FAMILIES, *(f"CLIP {name}" for name in TARGETS)])
def test_every_norm_of_the_host_is_known(name):
    """Its weight times its normalised input plus its bias is what the module itself gives."""
    _, norms, named = norms_of(name)
    assert norms.facts.keys() == named
    for path, module in norms.modules.items():
        layer = norms.facts[path]
        for dtype in (torch.float32, torch.bfloat16):
            x = probe(module, layer.shape[0], dtype)
            expected = module.to(dtype)(x)
            weight, bias = layer.weight(), layer.bias()
            found = layer.normalized(x).float() * layer.along_channels(weight, x.float())
            if bias is not None:
                found = found + layer.along_channels(bias, found)
            size = expected.float().abs().max()
            error = (found - expected.float()).abs().max()
            # Observed: 1e-7 and 0.007, where the host rounds along its way.
            assert error <= (1e-6 if dtype == torch.float32 else 0.01) * size, path


@pytest.mark.parametrize(
    "module",
    [
        nn.LayerNorm(6, elementwise_affine=False),
        nn.GroupNorm(2, 6, affine=False),
        nn.RMSNorm(6, elementwise_affine=False),
        nn.LayerNorm((2, 6)),
        nn.BatchNorm1d(6),
        nn.PReLU(6),
        nn.Linear(6, 6),
    ],
    ids=lambda module: str(module),
)
def test_what_is_no_norm_with_a_weight_of_one_axis(module):
    assert norm_facts(module) is None


def all_of(layers: ModelLayers) -> ModelLayers:
    return layers | layers.biases()


def changes(parts: ModelLayers, kind: str = "full", seed: int = 0) -> dict[str, Adapter]:
    """Random changes: of layers by `kind`, of norms and biases the change itself."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Adapter] = {}
    for path, layer in parts.facts.items():
        own = adapter_type(kind) if len(layer.shape) > 1 else Full
        own = Bias if path.endswith(".bias") else own
        adapter = made[path] = own.create(layer.shape, 4, 4.0, generator=generator)
        for parameter in adapter.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return made


def weight_of(path: str) -> str:
    return path if path.endswith((".bias", ".scale")) else f"{path}.weight"


def exact_gradients(family: str, adapters: dict[str, Adapter]) -> dict[str, torch.Tensor]:
    """By plain autograd of a float64 copy of the model that has the changes in its weights."""
    patcher = build(family, dtype=torch.float64, inference=False)
    patcher.model.requires_grad_(False)
    with torch.no_grad():
        for path, adapter in adapters.items():
            (diff,) = adapter.parameters()
            patcher.model.get_parameter(weight_of(path)).add_(diff.double())
    leaves = {
        path: patcher.model.get_parameter(weight_of(path)).requires_grad_() for path in adapters
    }
    step = OneStep.of(patcher, family)
    Gradients().compute(step.backward, lambda: patcher.model.zero_grad(set_to_none=True))
    return {p: torch.zeros_like(x) if x.grad is None else x.grad for p, x in leaves.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_weights_norms_and_biases_are_exact(family):
    """With the blocks computed again and without; the host's float32 against float64."""
    patcher = build(family)
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    before = Snapshot(patcher.model)
    with trainee(patcher):
        parts = all_of(unet_layers(patcher) | unet_norms(patcher))
        adapters = changes(parts)
        exact = exact_gradients(family, adapters)
        with attached(parts.modules, adapters, parts.facts):
            step = OneStep.of(patcher, family)
            diffs = {path: next(adapter.parameters()) for path, adapter in adapters.items()}
            for blocks in ([], repeated_blocks(patcher.model.diffusion_model)):
                forget(diffs.values())
                with recomputed(blocks):
                    Gradients().compute(step.backward, lambda: forget(diffs.values()))
                for path, expected in exact.items():
                    found = diffs[path].grad
                    error = (torch.zeros(()) if found is None else found) - expected
                    # Observed: 7e-6.
                    assert error.norm() <= 1e-4 * expected.norm() + 1e-9, path
    assert before.changes() == []


@pytest.mark.parametrize("kind", ["full", "lora", "oft", "ia3"])
@pytest.mark.parametrize("family", ["SD1.5", "SD3", "Flux"])
def test_a_file_does_what_was_trained(family, kind, tmp_path):
    """Our loader's model, and the host's own where it knows the type, sample as the live one."""
    patcher = build(family)
    parts = all_of(unet_layers(patcher) | unet_norms(patcher))
    adapters = changes(parts, kind)
    keymap = key_map(patcher, None)
    plain = sample(patcher, family)
    with attached(parts.modules, adapters, parts.facts):
        live = sample(patcher, family)
    file = tmp_path / "x.safetensors"
    LoraFile(adapters).save(file, keymap)
    read = LoraFile.read(file, keymap)
    assert read.adapters.keys() == adapters.keys()
    names = load_file(file)
    endings = {name.rpartition(".")[2] for name in names}
    assert {"w_norm", "diff_b"} <= endings and ("b_norm" in endings) == (family == "SD1.5")
    ours, _ = apply(patcher, None, [Entry(read.adapters, 1.0, 1.0)])
    models = {"ours": ours}
    if kind in ("full", "lora"):
        models["host's"], _ = comfy.sd.load_lora_for_models(patcher, None, dict(names), 1.0, 1.0)
    for name, model in models.items():
        found = sample(model, family)
        change = (live - plain).norm()
        assert change > 0.01 * plain.norm()
        assert (found - live).norm() <= 1e-3 * change, name  # observed: below 2e-5
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(patcher, family), plain)


@pytest.mark.parametrize("family", ["SD1.5", "Flux", "Lumina2"])
def test_norms_that_the_host_casts_while_they_run(family):
    """bf16 weights of a model that computes in float32."""
    patcher = training_patcher(build(family, dtype=torch.bfloat16), "fp32")
    with trainee(patcher):
        norms = unet_norms(patcher)
        parts = all_of(norms)
        adapters = changes(parts)
        for path, module in norms.modules.items():
            layer = norms.facts[path]
            own = {p: a for p, a in adapters.items() if p.removesuffix(".bias") == path}
            x = probe(module, layer.shape[0], torch.float32)
            with attached(parts.modules, own, parts.facts):
                found = module(x)
            weight = layer.weight() + own[path].diff
            expected = layer.normalized(x) * layer.along_channels(weight, x)
            if f"{path}.bias" in own:
                bias = layer.bias() + own[f"{path}.bias"].diff
                expected = expected + layer.along_channels(bias, x)
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["SD1", "SDXL", "Flux"])
def test_text_encoders(name, tmp_path):
    """The same of their layers, norms and biases, and the host loads the file."""
    clip = build_clip(name)
    parts = all_of(clip_layers(clip) | clip_norms(clip))
    adapters = changes(parts)
    keymap = key_map(None, clip)

    def encoded(one):
        with torch.inference_mode():
            return encode_caption(one, "a red fox")[0][0].clone()

    plain = encoded(clip)
    with attached(parts.modules, adapters, parts.facts):
        live = encoded(clip)
    LoraFile(adapters).save(tmp_path / "x.safetensors", keymap)
    read = LoraFile.read(tmp_path / "x.safetensors", keymap)
    _, ours = apply(None, clip, [Entry(read.adapters, 1.0, 1.0)])
    _, theirs = comfy.sd.load_lora_for_models(
        None, clip, load_file(tmp_path / "x.safetensors"), 1.0, 1.0
    )
    for one in (ours, theirs):
        change = (live - plain).norm()
        assert (encoded(one) - live).norm() <= 1e-4 * change  # observed: 3e-6
