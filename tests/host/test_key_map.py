"""The names that our files give to layers are kohya's, and the host knows each of them."""

import comfy.lora
import pytest
import torch
from torch import nn

from lora_weave.lora_core.host.models import (
    clip_layers,
    family_name,
    key_map,
    layer_facts,
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


@pytest.mark.parametrize("name", CASES)
def test_the_host_knows_every_name(made, name):
    model, clip = made(name)
    theirs = hosts_map(model, clip)
    for path, layer in key_map(model, clip).layers.items():
        for alias in (path, layer.kohya, *layer.aliases):
            assert theirs[alias] == weight_key(path)
        for alias, where in layer.slices.items():
            assert theirs[alias][:2] == (weight_key(path), where)


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


def test_sd15_names_are_diffusers(made):
    layers = key_map(*made("SD1.5")).layers
    found = {path: layers[f"diffusion_model.{path}"].kohya for path in SD15}
    assert found == {path: f"lora_unet_{name}" for path, name in SD15.items()}


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
