"""What LoRA Stack knows of the base: the same whatever is loaded, for every kind of path."""

from __future__ import annotations

from pathlib import Path

import comfy.hooks
import comfy.model_management
import folder_paths
import pytest
import torch

from lora_weave.lora_core.adapters import ADAPTERS, BIASES, Adapter
from lora_weave.lora_core.adapters.full import Full
from lora_weave.lora_core.adapters.replacement import Replacement
from lora_weave.lora_core.host.apply import apply
from lora_weave.lora_core.host.live import apply_live
from lora_weave.lora_core.host.models import key_map, unet_layers, unpatched_weights
from lora_weave.lora_core.lora_file import LoraFile
from lora_weave.lora_core.stack import Entry
from lora_weave.nodes.stack_run import Grams

from .families import build
from .test_apply import adapters_of
from .test_inplace import exact_weights, scaled_fp8_sd3
from .test_live import sampled
from .test_stack import row, run


@pytest.fixture(autouse=True)
def executor():
    """The host runs a node in inference mode."""
    with torch.inference_mode():
        yield
    comfy.model_management.unload_all_models()
    Grams.forget()


def saved(name: str, adapters: dict[str, Adapter], model) -> str:
    """The name of a new file of these adapters."""
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    folder.mkdir(parents=True, exist_ok=True)
    LoraFile(adapters).save(folder / name, key_map(model, None))
    return name


def full(layers) -> Entry:
    return Entry(adapters_of("full", layers, seed=1), 1.0, 0.0)


def live(model):
    found = apply_live(model, None, [full(unet_layers(model))])[0]
    comfy.model_management.load_models_gpu([found], force_full_load=True)
    return found


def patched(model):
    found = apply(model, None, [full(unet_layers(model))])[0]
    comfy.model_management.load_models_gpu([found], force_full_load=True)
    return found


def partly_loaded(model):
    """Its layers stay in memory of the CPU, and the patches are functions of them."""
    found = apply(model, None, [full(unet_layers(model))])[0]
    found.partially_load(torch.device("cpu"), 1)
    functions = [len(getattr(one, "weight_function", ())) for one in model.model.modules()]
    assert sum(functions) > 10
    return found


def hooked(model):
    """As a CLIP's hooks stay on while it is loaded."""
    found = model.clone()
    hook = comfy.hooks.WeightHook()
    found.forced_hooks = comfy.hooks.HookGroup()
    found.forced_hooks.add(hook)
    patches = apply(model, None, [full(unet_layers(model))])[0].patches
    found.add_hook_patches(hook, {key: one[0][1] for key, one in patches.items()})
    comfy.model_management.load_models_gpu([found], force_full_load=True)
    assert found.hook_backup
    return found


LOADED = [live, patched, partly_loaded, hooked]


@pytest.mark.parametrize("load", LOADED)
@pytest.mark.parametrize("kind", ["float32", "scaled fp8"])
def test_unpatched_weights_are_the_stored_ones(load, kind):
    model = build("SD3") if kind == "float32" else scaled_fp8_sd3()
    weights, paths = exact_weights(model.model), unet_layers(model).facts
    kept = load(model)
    weight = unpatched_weights(model, None)
    for path in paths:
        assert torch.equal(weight(path), weights[f"{path}.weight"]), path
    kept.detach()


def test_unpatched_norms_biases_and_modulations():
    for family in ("SD1.5", "Flux", "Wan"):
        model = build(family)
        exact, keymap = exact_weights(model.model), key_map(model, None)
        paths = [*keymap.layers, *keymap.norms, *(f"{path}.bias" for path in keymap.biases)]
        paths += keymap.parameters
        shapes = keymap.layers | keymap.norms | keymap.parameters
        changes = {}
        for path, layer in shapes.items():
            changes[path] = Full.from_tensors({"diff": torch.ones(layer.shape)}, layer.shape)
        for make in (apply, apply_live):
            changed = make(model, None, [Entry(changes, 1.0, 0.0)])[0]
            sampled(changed, family)
            weight = unpatched_weights(model, None)
            for path in paths:
                found = [name for name in (path, f"{path}.weight") if name in exact]
                assert torch.equal(weight(path), exact[found[0]]), path


@pytest.mark.parametrize("load", [live, partly_loaded])
def test_equal_energy_is_the_same_whatever_is_loaded(load):
    model = build("SD1.5")
    layers = unet_layers(model)
    kinds = ("oft", "lora")
    rows = {
        "rows": [
            row(saved(f"loaded_{kind}.safetensors", adapters_of(kind, layers, seed), model))
            for seed, kind in enumerate(kinds)
        ]
    }
    alone = run(rows, model=model, normalise="equal energy")
    Grams.forget()
    kept = load(model)
    found = run(rows, model=model, normalise="equal energy")
    assert [one.model for one in found["stacked"]] == [one.model for one in alone["stacked"]]
    assert found["report"] == alone["report"]
    kept.detach()


def test_equal_energy_knows_the_scale_of_fp8():
    """Within the rounding of fp8, as on the float32 model."""
    exact, scaled = build("SD3"), scaled_fp8_sd3()
    layers = unet_layers(exact)
    rows = [
        row(saved(f"scaled_{kind}.safetensors", adapters_of(kind, layers, seed), exact))
        for seed, kind in enumerate(("oft", "lora"))
    ]
    expected, found = (
        [one.model for one in run({"rows": rows}, model=it, normalise="equal energy")["stacked"]]
        for it in (exact, scaled)
    )
    assert found == pytest.approx(expected, rel=1e-2)


def every_change(model, kind: str) -> dict[str, Adapter]:
    """Of a kind wherever the model has a place for it."""
    keymap = key_map(model, None)
    if kind in ADAPTERS:
        return adapters_of(kind, unet_layers(model), seed=2)
    if kind in BIASES:
        owners = {path: (keymap.layers | keymap.norms)[path] for path in keymap.biases}
        changed = {
            f"{path}.bias": BIASES[kind](0.1 * torch.ones(layer.shape[0]))
            for path, layer in owners.items()
        }
        if kind == "bias gain":  # PEFT has it beside the gain of the weight alone
            gains = adapters_of("ia3", unet_layers(model), seed=2)
            changed = {p: a for p, a in changed.items() if p.removesuffix(".bias") in gains}
            return gains | changed
        return changed
    places = keymap.norms | keymap.parameters
    return {path: Replacement(torch.full(layer.shape, 0.9)) for path, layer in places.items()}


@pytest.mark.parametrize("family", ["SD1.5", "Flux", "Wan"])
@pytest.mark.parametrize("kind", [*ADAPTERS, *BIASES, Replacement.name])
def test_every_kind_of_change_in_every_mode(family, kind):
    """Beside a LoRA; live gives what patch gives, by every blending."""
    model = build(family)
    layers = unet_layers(model)
    rows = {
        "rows": [
            row(saved("a_lora.safetensors", adapters_of("lora", layers, seed=1), model), 0.1),
            row(saved("every_change.safetensors", every_change(model, kind), model), 0.1),
        ]
    }
    for rule in ("off", "equal energy"):
        master = 1.0 if rule == "off" else 0.5
        patch, beside = (
            run(rows, model=model, normalise=rule, master=master, mode=mode)
            for mode in ("patch", "live")
        )
        assert patch["report"] == beside["report"] and "Cosines are not" not in patch["report"]
        assert all(one.model > 0 for one in patch["stacked"])
        expected = sampled(patch["stacked_model"], family)
        change = (expected - sampled(model, family)).abs().max()
        error = (sampled(beside["stacked_model"], family) - expected).abs().max()
        assert error <= 1e-3 * change + 2e-5 * expected.abs().max()
