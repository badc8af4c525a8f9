"""Files that name q, k and v of fused layers give the host's own result."""

import comfy.lora
import pytest
import torch

from lora_weave.lora_core.host.models import UNET_PREFIX, key_map
from lora_weave.lora_core.lora_file import LoraFile

from .families import build

# Where the host itself takes wrong rows: see OTHER_ROWS in test_key_map.py.
WRONG_IN_THE_HOST = {"Lumina2": ("to_k", "to_v"), "Flux": ("proj_mlp",), "Chroma": ("proj_mlp",)}


def split_file(keymap, seed=0, skip=()):
    """Every layer as diffusers names it; {tensor name: tensor} and {layer path: dense ΔW}."""
    generator = torch.Generator().manual_seed(seed)
    tensors, changes = {}, {}
    for path, layer in keymap.layers.items():
        for name in layer.diffusers:
            if name.endswith(tuple(skip)):
                continue
            _, start, length = layer.slices.get(name, (0, 0, layer.shape[0]))
            rest, ones = layer.shape[1:], [1] * (len(layer.shape) - 2)
            up = torch.randn(length, 2, *ones, generator=generator)
            down = torch.randn(2, *rest, generator=generator)
            alpha = 0.5 + len(tensors) % 3
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = down, up
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
            exact = up.flatten(1).double() @ down.flatten(1).double() * (alpha / 2)
            if name in layer.swapped:
                exact = torch.cat([exact[length // 2 :], exact[: length // 2]])
            whole = changes.setdefault(path, torch.zeros(layer.shape, dtype=torch.float64))
            whole[start : start + length] += exact.reshape(length, *rest)
    return tensors, changes


FAMILIES = ["SD1.5", "SDXL", "SD3", "Flux", "Chroma", "Lumina2", "Z-Image", "Qwen-Image", "Wan"]


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_names_make_the_dense_change(family):
    keymap = key_map(build(family), None)
    tensors, changes = split_file(keymap)
    lora = LoraFile.from_state_dict(tensors, keymap)
    assert lora.adapters.keys() == changes.keys()
    for path, adapter in lora.adapters.items():
        found = adapter.double().delta(torch.zeros(adapter.shape, dtype=torch.float64))
        torch.testing.assert_close(found, changes[path], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["SD3", "Flux", "Chroma", "Lumina2", "Z-Image", "Qwen-Image"])
def test_the_host_gives_the_same(family):
    model = build(family)
    keymap = key_map(model, None)
    tensors, _ = split_file(keymap, skip=WRONG_IN_THE_HOST.get(family, ()))
    if family == "Lumina2":  # the host knows it by the names that Z-Image has in diffusers
        tensors = {name.replace(".attn.to_q", ".attention.to_q"): t for name, t in tensors.items()}
    if family in ("Lumina2", "Z-Image"):  # 0.3.75 knows these with this prefix alone
        tensors = {name.replace("transformer.", UNET_PREFIX, 1): t for name, t in tensors.items()}
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    patched = model.clone()
    loaded = comfy.lora.load_lora(tensors, names, log_missing=False)
    assert loaded and patched.add_patches(loaded)
    lora = LoraFile.from_state_dict(tensors, keymap)
    assert family == "Lumina2" or len(loaded) == len(tensors) // 3
    for key, patches in patched.patches.items():
        weight = torch.zeros(lora.adapters[key.removesuffix(".weight")].shape)
        theirs = comfy.lora.calculate_weight(patches, weight.clone(), key)
        ours = lora.adapters[key.removesuffix(".weight")].delta(weight)
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-5, atol=1e-5)
