"""Files that name q, k and v of fused layers give the host's own result, or the exact one."""

import comfy.lora
import comfy.utils
import pytest
import torch

from lora_weave.lora_core.adapters import ADAPTERS
from lora_weave.lora_core.adapters.pieces import Pieces
from lora_weave.lora_core.host.apply import apply
from lora_weave.lora_core.host.live import apply_live
from lora_weave.lora_core.host.models import UNET_PREFIX, key_map, unet_layers
from lora_weave.lora_core.lora_file import LoraFile
from lora_weave.lora_core.stack import Entry

from ..core.layer_kinds import fill
from .families import build
from .test_apply import patched_weights
from .test_live import assert_close, sampled

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


def attention(keymap):
    """(its name in diffusers, layer, rows) of every q, k and v of a Flux, added ones too."""
    for layer in keymap.layers.values():
        for name in layer.diffusers:
            if name.endswith(("to_q", "to_k", "to_v", "_q_proj", "_k_proj", "_v_proj")):
                yield name, layer, layer.slices[name]


SPELLINGS = {  # prefix, what joins the words, names of up, down and magnitude
    "diffusers": ("transformer.", ".", "lora_B.weight", "lora_A.weight", "lora_magnitude_vector"),
    "OneTrainer": ("lora_transformer_", "_", "lora_up.weight", "lora_down.weight", "dora_scale"),
}


def attention_dora(model, spelling):
    """A DoRA of the attention alone, and {layer path: W + ΔW in float64, row by row}."""
    prefix, joint, up_name, down_name, magnitude_name = SPELLINGS[spelling]
    generator, layers = torch.Generator().manual_seed(0), unet_layers(model).facts
    tensors, changed = {}, {}
    for name, layer, (_, start, length) in attention(key_map(model, None)):
        weight = layers[layer.path].weight().double()
        up = torch.randn(length, 2, generator=generator)
        down = torch.randn(2, layer.shape[1], generator=generator) * 0.1
        factor = torch.rand(length, generator=generator) + 0.5
        rows = weight[start : start + length]
        magnitude = (rows.norm(dim=1) * factor).float()
        stem = prefix + name.removeprefix("transformer.").replace(".", joint)
        tensors |= {f"{stem}.{up_name}": up, f"{stem}.{down_name}": down}
        size = (-1, 1) if magnitude_name == "dora_scale" else (-1,)
        tensors[f"{stem}.{magnitude_name}"] = magnitude.reshape(size)
        whole = changed.setdefault(layer.path, weight.clone())
        for row in range(length):
            sum_ = rows[row] + up[row].double() @ down.double()
            whole[start + row] = magnitude[row].double() * sum_ / sum_.norm()
    return tensors, changed


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_dora_of_flux_s_attention_alone(spelling):
    """Its single blocks have q, k and v beside rows of the MLP that stay."""
    with torch.inference_mode():
        model = build("Flux")
        tensors, changed = attention_dora(model, spelling)
        lora = LoraFile.from_state_dict(tensors, key_map(model, None))
        single = [path for path in changed if path.endswith("linear1")]
        assert single and all(isinstance(lora.adapters[path], Pieces) for path in single)
        for strength in (1.0, -0.5):
            stack = [Entry(lora.adapters, strength, 0.0)]
            before = patched_weights(model)
            found = patched_weights(apply(model, None, stack)[0])
            for path, whole in changed.items():
                base = before[f"{path}.weight"].double()
                expected = base + strength * (whole - base)
                error = (found[f"{path}.weight"].double() - expected).abs().max()
                assert error <= 2e-6 * expected.abs().max()
            patched = sampled(apply(model, None, stack)[0], "Flux")
            assert_close(sampled(apply_live(model, None, stack)[0], "Flux"), patched)


@pytest.mark.parametrize("format", ["kohya", "comfyui", "diffusers"])
@pytest.mark.parametrize("kind", ["lokr", "loha"])
@pytest.mark.parametrize("family", ["Flux", "SD3", "Z-Image"])
def test_the_host_reads_what_is_written_of_pieces(family, kind, format, tmp_path):
    model = build(family)
    keymap = key_map(model, None)
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, layer, (_, _, length) in attention(keymap):
        one = ADAPTERS[kind].create((length, layer.shape[1]), 2, 3.0, generator=generator)
        fill(one, generator)
        tensors |= {f"{name}.{key}": tensor for key, tensor in one.tensors().items()}
    lora = LoraFile.from_state_dict(tensors, keymap)
    assert all(isinstance(adapter, Pieces) for adapter in lora.adapters.values())
    numbers = sum(t.numel() for name, t in tensors.items() if not name.endswith(".alpha"))
    held = sum(p.numel() for one in lora.adapters.values() for p in one.parameters())
    assert held == numbers  # not the 100 times as many of a dense change
    path = tmp_path / "x.safetensors"
    lora.save(path, keymap, format=format)
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    read = comfy.utils.load_torch_file(str(path), safe_load=True)
    if format == "diffusers" and family == "Z-Image":  # 0.3.75 knows them with this prefix alone
        read = {name.replace("transformer.", UNET_PREFIX, 1): t for name, t in read.items()}
    patched = model.clone()
    assert patched.add_patches(comfy.lora.load_lora(read, names, log_missing=False))
    assert len(patched.patches) == len(lora.adapters)
    for path, adapter in lora.adapters.items():
        weight = torch.zeros(adapter.shape)
        key = f"{path}.weight"
        theirs = comfy.lora.calculate_weight(patched.patches[key], weight.clone(), key)
        torch.testing.assert_close(adapter.delta(weight).detach(), theirs, rtol=1e-5, atol=1e-5)
