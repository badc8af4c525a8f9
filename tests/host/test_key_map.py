"""The names that our files give to layers are kohya's, and the host knows each of them."""

import re

import comfy.lora
import comfy.utils
import pytest
import torch
from torch import nn

from lora_weave.lora_core.adapters import ADAPTERS, Bias
from lora_weave.lora_core.adapters.full import Full
from lora_weave.lora_core.host.models import (
    clip_layers,
    family_name,
    key_map,
    layer_facts,
    patch_key,
    unet_layers,
)
from lora_weave.lora_core.lora_file import LoraFile

from .families import FAMILIES, build
from .one_step import random_adapters
from .text_encoders import TARGETS, build_clip

# The tiny SD1.5 has two levels with one block each; names as in kohya's and LyCORIS' files.
SD15 = {
    "input_blocks.0.0": "conv_in",
    "input_blocks.1.0.in_layers.2": "down_blocks_0_resnets_0_conv1",
    "input_blocks.1.0.emb_layers.1": "down_blocks_0_resnets_0_time_emb_proj",
    "input_blocks.1.0.out_layers.3": "down_blocks_0_resnets_0_conv2",
    "input_blocks.1.1.proj_in": "down_blocks_0_attentions_0_proj_in",
    "input_blocks.1.1.transformer_blocks.0.attn1.to_q": (
        "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    ),
    "input_blocks.1.1.transformer_blocks.0.attn2.to_out.0": (
        "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_out_0"
    ),
    "input_blocks.1.1.transformer_blocks.0.ff.net.0.proj": (
        "down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj"
    ),
    "input_blocks.2.0.op": "down_blocks_0_downsamplers_0_conv",
    "input_blocks.3.0.skip_connection": "down_blocks_1_resnets_0_conv_shortcut",
    "middle_block.0.in_layers.2": "mid_block_resnets_0_conv1",
    "middle_block.1.transformer_blocks.0.attn2.to_k": (
        "mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    ),
    "middle_block.2.out_layers.3": "mid_block_resnets_1_conv2",
    "output_blocks.0.1.proj_out": "up_blocks_0_attentions_0_proj_out",
    "output_blocks.1.2.conv": "up_blocks_0_upsamplers_0_conv",
    "output_blocks.2.1.transformer_blocks.0.attn1.to_v": (
        "up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_v"
    ),
    "output_blocks.3.0.in_layers.2": "up_blocks_1_resnets_1_conv1",
    "time_embed.2": "time_embedding_linear_2",
    "out.2": "conv_out",
}
ORIGINAL = {  # of models that kohya's scripts name as their own checkpoints do
    "SDXL": ["input_blocks_3_1_transformer_blocks_1_attn1_to_q", "middle_block_1_proj_in"],
    "SD3": ["joint_blocks_0_x_block_attn_qkv", "joint_blocks_1_x_block_mlp_fc1"],
    "Flux": [
        "double_blocks_0_img_attn_qkv",
        "single_blocks_1_linear1",
        "double_blocks_1_txt_mod_lin",
    ],
}
_LAYER = "text_model_encoder_layers_0_self_attn_q_proj"
_T5 = "encoder_block_1_layer_0_SelfAttention_q"
TEXT = {  # sd-scripts train_network.py, sdxl_, sd3_ and flux_train_network.py
    "SD1": {"clip_l": f"lora_te_{_LAYER}"},
    "SDXL": {"clip_l": f"lora_te1_{_LAYER}", "clip_g": f"lora_te2_{_LAYER}"},
    "SD3": {
        "clip_l": f"lora_te1_{_LAYER}",
        "clip_g": f"lora_te2_{_LAYER}",
        "t5xxl": f"lora_te3_{_T5}",
    },
    "Flux": {"clip_l": f"lora_te1_{_LAYER}", "t5xxl": f"lora_te3_{_T5}"},
}


@pytest.fixture(scope="module")
def made():
    """(model or None, clip or None) by name, each built once."""
    cache = {}

    def make(name):
        if name not in cache:
            cache[name] = (build(name), None) if name in FAMILIES else (None, build_clip(name[5:]))
        return cache[name]

    return make


CASES = [*FAMILIES, *(f"CLIP {name}" for name in TARGETS)]


def hosts_map(model, clip):
    if model is not None:
        return comfy.lora.model_lora_keys_unet(model.model, {})
    return comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})


def weight_key(path: str) -> str:
    return path.removeprefix("text_encoders.") + ".weight"


# The host takes these rows from sizes that most models have; ours are those of the live layer.
OTHER_ROWS = {
    "Lumina2": re.compile(r"(to_k|to_v)$"),  # grouped heads: k and v are narrower than q
    "Flux": re.compile(r"proj_mlp$"),  # an MLP of 2 times the width, not 4
    "Flux2": re.compile(r"proj_mlp$"),
    "Chroma": re.compile(r"proj_mlp$"),
}


@pytest.mark.parametrize("name", CASES)
def test_names_mean_what_they_mean_to_the_host(made, name):
    model, clip = made(name)
    theirs = hosts_map(model, clip)
    seen, layers = set(), key_map(model, clip).layers
    for path, layer in layers.items():
        assert theirs[path] == theirs[layer.kohya] == weight_key(path)
        for alias in {layer.kohya, *layer.aliases} & theirs.keys():
            assert theirs[alias] == weight_key(path)
        for alias in layer.slices.keys() & theirs.keys():
            key, rows = theirs[alias][:2]
            assert key == weight_key(path)
            if not (name in OTHER_ROWS and OTHER_ROWS[name].search(alias)):
                assert rows == layer.slices[alias]
        for alias in set(layer.swapped) & theirs.keys():
            assert theirs[alias][0] == weight_key(path) and len(theirs[alias]) == 3
        seen |= {path, layer.kohya, *layer.aliases, *layer.slices, *layer.swapped}
    weights = {weight_key(path) for path in layers}
    targets = {alias: key if isinstance(key, str) else key[0] for alias, key in theirs.items()}
    assert not {alias for alias, key in targets.items() if key in weights} - seen


@pytest.mark.parametrize("name", FAMILIES)
def test_slices_lie_within_their_layer_and_make_it_whole(made, name):
    for layer in key_map(*made(name)).layers.values():
        for axis, start, length in layer.slices.values():
            assert axis == 0 and 0 <= start and start + length <= layer.shape[0]
        rows = [layer.slices[alias] for alias in layer.diffusers if alias in layer.slices]
        if rows:
            assert sum(length for _, _, length in rows) == layer.shape[0]


@pytest.mark.parametrize("name", CASES)
def test_names_are_unique_and_shapes_are_the_weights(made, name):
    model, clip = made(name)
    root = model.model if model is not None else clip.cond_stage_model
    layers = key_map(model, clip).layers
    assert len({layer.kohya for layer in layers.values()}) == len(layers)
    for path, layer in layers.items():
        assert layer.path == path
        assert layer.shape == tuple(root.get_parameter(weight_key(path)).shape)
    wanted = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    assert len(layers) == sum(isinstance(module, wanted) for module in root.modules())


@pytest.mark.parametrize("name", CASES)
def test_the_host_loads_a_file_with_our_names(made, name, caplog):
    model, clip = made(name)
    layers = unet_layers(model) if model is not None else clip_layers(clip)
    ours = LoraFile(random_adapters(layers)).to_kohya(key_map(model, clip))
    loaded = comfy.lora.load_lora(ours, hosts_map(model, clip))
    assert set(loaded) == {weight_key(path) for path in layers.facts}
    assert not caplog.records  # the host warns of keys that it does not know


@pytest.mark.parametrize("name", CASES)
def test_the_host_loads_norms_and_biases_with_our_names(made, name, caplog):
    model, clip = made(name)
    keymap = key_map(model, clip)
    root = model.model if model is not None else clip.cond_stage_model
    generator = torch.Generator().manual_seed(0)
    adapters = {}
    for path in keymap.norms:
        diff = torch.randn(keymap.shape(path), generator=generator)
        adapters[path] = Full.from_tensors({"diff": diff}, tuple(diff.shape))
    for path in keymap.biases:
        diff = torch.randn(keymap.shape(path + ".bias"), generator=generator)
        adapters[path + ".bias"] = Bias.from_tensors({"diff_b": diff}, tuple(diff.shape))
    assert adapters
    file = LoraFile(adapters)
    for tensors in (file.to_kohya(keymap), file.to_generic()):
        loaded = comfy.lora.load_lora(dict(tensors), hosts_map(model, clip))
        assert not caplog.records
        assert set(loaded) == {patch_key(path) for path in adapters}
        for path, adapter in adapters.items():
            _, (diff,) = loaded[patch_key(path)]
            assert torch.equal(diff, adapter.delta(diff))
            assert diff.shape == root.get_parameter(patch_key(path)).shape
        again = LoraFile.from_state_dict(tensors, keymap)
        assert again.adapters.keys() == adapters.keys()


@pytest.mark.parametrize("format", ["kohya", "comfyui"])
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "full"])
def test_the_host_gives_our_change_for_files_written_here(made, tmp_path, format, kind):
    model, _ = made("SD1.5")
    keymap, adapters = key_map(model, None), {}
    generator = torch.Generator().manual_seed(0)
    for path, shape in unet_layers(model).shapes().items():
        adapters[path] = ADAPTERS[kind].create(shape, 2, 0.7, generator=generator)
        for parameter in adapters[path].parameters():
            parameter.data.normal_(std=0.3, generator=generator)
    LoraFile(adapters).save(tmp_path / "x.safetensors", keymap, format=format)
    tensors = comfy.utils.load_torch_file(str(tmp_path / "x.safetensors"))
    loaded = comfy.lora.load_lora(tensors, hosts_map(model, None))
    assert loaded.keys() == {patch_key(path) for path in adapters}
    for path, adapter in adapters.items():
        weight, key = torch.zeros(adapter.shape), patch_key(path)
        theirs = comfy.lora.calculate_weight(
            [(1.0, loaded[key], 1.0, None, None)], weight.clone(), key
        )
        torch.testing.assert_close(adapter.delta(weight).detach(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["Flux", "Flux2", "Chroma"])
def test_norms_that_call_their_weight_scale_are_named(made, family):
    """As in 0.3.75, and as hosts that call it weight do: files of one are read on the other."""
    keymap = key_map(*made(family))
    path = "diffusion_model.double_blocks.0.img_attn.norm.query_norm"
    norm = keymap.find(path)
    underscored = "lora_unet_double_blocks_0_img_attn_norm_query_norm"
    assert norm.shape == (32,)
    for name in (path, underscored, f"{path}.scale", "transformer_blocks.0.attn.norm_q"):
        assert keymap.find(name) is norm, name


def test_sd15_names_are_diffusers(made):
    layers = key_map(*made("SD1.5")).layers
    found = {path: layers[f"diffusion_model.{path}"].kohya for path in SD15}
    assert found == {path: f"lora_unet_{name}" for path, name in SD15.items()}


D = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
T = "text_model.encoder.layers.0.self_attn.q_proj"
NAMES = {  # (model or CLIP, dialect): how a file begins a name of one layer or of some of its rows
    ("SD1.5", "diffusers"): f"unet.{D}",
    ("SD1.5", "PEFT folder"): f"base_model.model.{D}",
    ("SD1.5", "PEFT in a pipeline"): f"unet.base_model.model.{D}",
    ("SD1.5", "old diffusers"): "unet." + D.replace("attn1.", "attn1.processor."),
    ("SD1.5", "LyCORIS"): "lycoris_" + D.replace(".", "_"),
    ("SD1.5", "LyCORIS of the host's"): "lycoris_input_blocks_1_1_transformer_blocks_0_attn1_to_q",
    ("SD1.5", "kohya OFT"): "oft_unet_" + D.replace(".", "_"),
    ("SD1.5", "raw"): "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    ("SDXL", "diffusers"): "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    ("SD3", "diffusers"): "transformer.transformer_blocks.0.attn.add_k_proj",
    ("SD3", "OneTrainer"): "lora_transformer_transformer_blocks_0_attn_to_q",
    ("SD3", "PEFT"): "base_model.model.transformer_blocks.0.attn.to_q",
    ("Flux", "diffusers"): "transformer.single_transformer_blocks.0.proj_mlp",
    ("Flux", "bare"): "single_transformer_blocks.0.attn.to_q",
    ("Flux", "SimpleTuner"): "lycoris_transformer_blocks_0_attn_to_q",
    ("Flux", "BFL"): "double_blocks.0.img_attn.qkv",
    ("Flux", "XLabs"): "double_blocks.0.processor.qkv_lora2",
    ("Flux", "XLabs, single"): "single_blocks.1.processor.qkv",
    ("Z-Image", "diffusers"): "transformer.layers.0.attention.to_k",
    ("Z-Image", "ai-toolkit"): "diffusion_model.layers.0.attention.to_out.0",
    ("Lumina2", "diffusers"): "transformer.layers.0.attn.to_v",
    ("Lumina2", "diffusers, MLP"): "transformer.layers.1.feed_forward.linear_2",
    ("Lumina2", "SimpleTuner"): "lycoris_layers_0_attention_qkv",
    ("Qwen-Image", "diffusers"): "transformer.transformer_blocks.0.attn.add_q_proj",
    ("Qwen-Image", "PEFT"): "base_model.model.transformer_blocks.0.img_mlp.net.2",
    ("Wan", "diffusers"): "transformer.blocks.0.attn2.to_k",
    ("Wan", "bare"): "blocks.0.cross_attn.k",
    ("Wan", "kohya with two underscores"): "lora_unet__blocks_0_cross_attn_k",
    ("CLIP SD1", "kohya"): "lora_te_" + T.replace(".", "_"),
    ("CLIP SD1", "PEFT folder"): f"base_model.model.{T}",
    ("CLIP SDXL", "diffusers"): f"text_encoder_2.{T}",
    ("CLIP SDXL", "PEFT"): f"text_encoder.base_model.model.{T}",
    ("CLIP SD3", "T5"): "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q",
    ("CLIP Flux", "OneTrainer's T5"): "lora_te2_encoder_block_0_layer_0_SelfAttention_q",
    ("CLIP Flux", "diffusers' T5"): "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
    ("CLIP SD1", "host"): f"text_encoders.clip_l.transformer.{T}",
}


@pytest.mark.parametrize("name, dialect", NAMES)
def test_every_dialect_is_known(made, name, dialect):
    assert key_map(*made(name)).find(NAMES[name, dialect]) is not None


def test_swapped_rows_are_told_from_whole_layers(made):
    layer = key_map(*made("Flux")).find("transformer.norm_out.linear")
    assert layer.path == "diffusion_model.final_layer.adaLN_modulation.1"
    assert "transformer.norm_out.linear" in layer.swapped


@pytest.mark.parametrize("prefix", ["unet.", "base_model.model.", "unet.base_model.model."])
def test_files_that_the_host_loads_in_part_are_whole_here(made, prefix):
    """115 modules of SD1.5 as diffusers and PEFT name them, of which 0.3.75 loads 59, 0 and 0."""
    model, _ = made("SD1.5")
    keymap, adapters = key_map(model, None), random_adapters(unet_layers(model))
    tensors = {}
    for path, adapter in adapters.items():
        name = keymap.layers[path].diffusers[0].removeprefix("unet.")
        if any(word in name for word in ("conv_in", "conv_out", "time_embedding")):
            continue
        tensors[f"{prefix}{name}.lora_A.weight"] = adapter.down.detach()
        tensors[f"{prefix}{name}.lora_B.weight"] = adapter.up.detach()
    theirs = comfy.lora.load_lora(dict(tensors), hosts_map(model, None), log_missing=False)
    ours = LoraFile.from_state_dict(tensors, keymap)
    assert ours.problems == () and len(ours.adapters) == len(tensors) // 2
    assert len(theirs) < len(ours.adapters) == 115
    for path, adapter in ours.adapters.items():
        assert torch.equal(adapter.up, adapters[path].up)
        assert torch.equal(adapter.down, adapters[path].down)


@pytest.mark.parametrize("family", ORIGINAL)
def test_other_names_are_the_originals(made, family):
    layers = key_map(*made(family)).layers
    names = {layer.kohya for layer in layers.values()}
    assert {f"lora_unet_{name}" for name in ORIGINAL[family]} <= names
    for path, layer in layers.items():
        module = path.removeprefix("diffusion_model.")
        assert layer.kohya == "lora_unet_" + module.replace(".", "_")


@pytest.mark.parametrize("name", TEXT)
def test_text_encoders_are_numbered_where_there_are_several(made, name):
    layers = key_map(*made(f"CLIP {name}")).layers
    prefixes = {}
    for path, layer in layers.items():
        prefixes.setdefault(path.split(".")[1], set()).add(layer.kohya.split("_")[1])
    assert {layer.kohya for layer in layers.values()} >= set(TEXT[name].values())
    wanted = {encoder: {kohya.split("_")[1]} for encoder, kohya in TEXT[name].items()}
    if name == "SD1":
        wanted["clip_l"].add("te1")  # text_projection, which kohya's does not train
    assert prefixes == wanted


ENCODERS = [
    ("SDXL", "clip_l", "1"),
    ("SDXL", "clip_g", "2"),
    ("SD3", "clip_l", "1"),
    ("SD3", "clip_g", "2"),
    ("SD3", "t5xxl", "3"),
    ("Flux", "clip_l", "1"),
    ("Flux", "t5xxl", "23"),  # diffusers' second is kohya's third
]


@pytest.mark.parametrize("name, encoder, numbers", ENCODERS)
def test_text_encoders_in_every_spelling(made, name, encoder, numbers):
    keymap = key_map(*made(f"CLIP {name}"))
    component = "text_encoder" if numbers == "1" else f"text_encoder_{numbers[0]}"
    layers = [layer for path, layer in keymap.layers.items() if f".{encoder}.trans" in path]
    assert len(layers) > 10
    for layer in layers:
        module = layer.path.partition(".transformer.")[2]
        flat = module.replace(".", "_")
        names = [f"{component}.{module}", f"{component}.base_model.model.{module}", layer.path]
        names += [f"{kind}_te{n}_{flat}" for n in numbers for kind in ("lora", "lycoris", "oft")]
        assert all(keymap.find(name) is layer for name in names), names


def test_model_and_clip_share_no_names(made):
    model, clip = made("SDXL")[0], made("CLIP SDXL")[1]
    together = key_map(model, clip)
    assert together.family == family_name(model) == "SDXL"
    assert len(together.layers) == len(unet_layers(model).facts) + len(clip_layers(clip).facts)


@pytest.mark.parametrize(
    "module, shape",
    [
        (nn.Linear(6, 4), (4, 6)),
        (nn.Conv2d(6, 4, (3, 1), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (4, 6, 3, 1)),
        (nn.Conv1d(6, 4, 3), (4, 6, 3)),
        (nn.Conv3d(6, 4, 1), (4, 6, 1, 1, 1)),
        (nn.Conv2d(6, 4, 3, groups=2), None),
        (nn.Conv2d(6, 4, 3, padding="same"), None),
        (nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), None),
        (nn.ConvTranspose2d(6, 4, 3), None),
        (nn.LayerNorm(6), None),
        (nn.Embedding(6, 4), None),
        (nn.SiLU(), None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_layer_facts(module, shape):
    layer = layer_facts(module)
    assert (layer and layer.shape) == shape
    if layer is not None:
        assert torch.equal(layer.weight(), module.weight)
        for name in ("stride", "padding", "dilation"):
            assert getattr(layer, name) == tuple(getattr(module, name, ()))
