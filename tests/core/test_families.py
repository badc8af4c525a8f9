"""Files are read, named and written by their family's layers, without a model or a host."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lora_weave.lora_core.families import (
    FAMILIES,
    FOLDER,
    family_file,
    family_key_map,
    key_map_for,
    variant_key_map,
    variants,
)
from lora_weave.lora_core.families.lines import expanded, grouped
from lora_weave.lora_core.key_map import MODEL, TEXT_ENCODER, KeyMap
from lora_weave.lora_core.lora_file import LoraFile, LoraFileError
from lora_weave.lora_core.lora_model import LoraModel

from .tolerances import assert_close

VARIANTS = [(family, variant) for family in FAMILIES for variant in variants(family)]
RANK = 2

# (family, variant): names in files of several dialects, and (path, rows) of what each means.
_SD15 = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k"
_SDXL = "diffusion_model.input_blocks.7.1.transformer_blocks.9.attn2.to_k"
_FLUX = "diffusion_model.double_blocks.18.img_attn.qkv"
_TEXT_LAYER = "text_model.encoder.layers.11.self_attn"
_TEXT = f"transformer.{_TEXT_LAYER}.q_proj"
NAMES: dict[tuple[str, str], dict[str, tuple[str, tuple[int, int] | None]]] = {
    ("SD1.5", "base"): {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (_SD15, None),
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (_SD15, None),
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k": (_SD15, None),
        "lora_te_text_model_encoder_layers_11_self_attn_q_proj": (
            f"text_encoders.clip_l.{_TEXT}",
            None,
        ),
    },
    ("SDXL", "base"): {
        "lora_unet_input_blocks_7_1_transformer_blocks_9_attn2_to_k": (_SDXL, None),
        "lora_unet_down_blocks_2_attentions_0_transformer_blocks_9_attn2_to_k": (_SDXL, None),
        "base_model.model.down_blocks.2.attentions.0.transformer_blocks.9.attn2.to_k": (
            _SDXL,
            None,
        ),
        "lora_te2_text_model_encoder_layers_11_self_attn_q_proj": (
            f"text_encoders.clip_g.{_TEXT}",
            None,
        ),
        **{
            f"{encoder}.{_TEXT_LAYER}.to_{word}": (
                f"text_encoders.{path}.transformer.{_TEXT_LAYER}.{word}_proj",
                None,
            )
            for encoder, path in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g"))
            for word in ("q", "k", "v", "out")
        },
    },
    ("SD3", "3.5 large"): {
        "lora_unet_joint_blocks_37_x_block_attn_qkv": (
            "diffusion_model.joint_blocks.37.x_block.attn.qkv",
            None,
        ),
        "transformer.transformer_blocks.37.attn.to_v": (
            "diffusion_model.joint_blocks.37.x_block.attn.qkv",
            (4864, 2432),
        ),
    },
    ("Flux", "dev"): {
        "lora_unet_double_blocks_18_img_attn_qkv": (_FLUX, None),
        "transformer.transformer_blocks.18.attn.to_k": (_FLUX, (3072, 3072)),
        "double_blocks.18.processor.qkv_lora1": (_FLUX, None),
        "lora_te3_encoder_block_23_layer_0_SelfAttention_q": (
            "text_encoders.t5xxl.transformer.encoder.block.23.layer.0.SelfAttention.q",
            None,
        ),
    },
    ("Lumina2", "2.0"): {
        "transformer.layers.25.attn.to_k": (
            "diffusion_model.layers.25.attention.qkv",
            (2304, 768),
        ),
        "lora_unet_layers_25_attention_qkv": ("diffusion_model.layers.25.attention.qkv", None),
    },
    ("Z-Image", "base"): {
        "diffusion_model.layers.29.attention.to_v": (
            "diffusion_model.layers.29.attention.qkv",
            (7680, 3840),
        ),
        "lora_unet_layers_29_feed_forward_w1": ("diffusion_model.layers.29.feed_forward.w1", None),
    },
    ("Qwen-Image", "base"): {
        "transformer.transformer_blocks.59.attn.add_q_proj": (
            "diffusion_model.transformer_blocks.59.attn.add_q_proj",
            None,
        ),
        "lora_unet_transformer_blocks_59_img_mlp_net_2": (
            "diffusion_model.transformer_blocks.59.img_mlp.net.2",
            None,
        ),
    },
    ("Wan", "14B"): {
        "diffusion_model.blocks.39.self_attn.q": ("diffusion_model.blocks.39.self_attn.q", None),
        "transformer.blocks.39.attn2.to_k": ("diffusion_model.blocks.39.cross_attn.k", None),
        "lora_unet_blocks_39_ffn_0": ("diffusion_model.blocks.39.ffn.0", None),
    },
}
CASES = [(family, variant, name) for (family, variant), names in NAMES.items() for name in names]


def shape_of(keymap: KeyMap, path: str) -> tuple[int, ...]:
    shape = keymap.shape(path)
    assert shape is not None
    return shape


def tensors_of(keymap: KeyMap, names: list[str]) -> dict[str, torch.Tensor]:
    """A LoRA of whole layers or rows of them, by names that `keymap` knows."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in names:
        layer = keymap.find(name)
        assert layer is not None, name
        rows = layer.slices[name][2] if name in layer.slices else layer.shape[0]
        kernel = layer.shape[2:]
        tensors[f"{name}.lora_down.weight"] = torch.randn(
            RANK, layer.shape[1], *kernel, generator=generator
        )
        tensors[f"{name}.lora_up.weight"] = torch.randn(
            rows, RANK, *(1 for _ in kernel), generator=generator
        )
    return tensors


@pytest.mark.parametrize("family, variant", VARIANTS)
def test_every_variant_has_a_key_map_of_all_its_parts(family: str, variant: str) -> None:
    keymap = variant_key_map(family, variant)
    assert keymap.family == keymap.label == family
    assert keymap.parts == {MODEL, TEXT_ENCODER}
    assert keymap.norms and keymap.biases
    assert keymap.biases <= {*keymap.layers, *keymap.norms}
    assert all(len(layer.shape) > 1 for layer in keymap.layers.values())
    assert all(len(norm.shape) == 1 for norm in keymap.norms.values())
    assert variant_key_map(family, variant) is keymap  # made once


@pytest.mark.parametrize("family, variant, name", CASES)
def test_a_name_of_any_dialect_means_its_layer(family: str, variant: str, name: str) -> None:
    path, rows = NAMES[family, variant][name]
    layer = variant_key_map(family, variant).find(name)
    assert layer is not None and layer.path == path
    assert layer.slices.get(name) == (None if rows is None else (0, *rows))


@pytest.mark.parametrize("family, variant, name", CASES)
def test_a_file_is_read_without_a_key_map(
    tmp_path: Path, family: str, variant: str, name: str
) -> None:
    """The family is recognised, too, where the names of one layer tell it."""
    keymap = variant_key_map(family, variant)
    path, rows = NAMES[family, variant][name]
    base = {"ss_base_model_version": "sd_v1"} if family == "SD1.5" else {}
    names = [name, next(iter(NAMES[family, variant]))] if part_is_text(path) else [name]
    tensors = tensors_of(keymap, names)
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", metadata=base)
    lora = LoraFile.read(tmp_path / "x.safetensors")
    assert lora.keymap is keymap and lora.family == family
    up, down = tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"]
    dense = torch.zeros(shape_of(keymap, path))
    start, length = rows or (0, len(dense))
    dense[start : start + length] = (up.flatten(1) @ down.flatten(1)).reshape(
        length, *dense.shape[1:]
    )
    delta = lora.adapters[path].delta(torch.zeros_like(dense)).detach()
    assert_close(delta, dense)


def part_is_text(path: str) -> bool:
    return path.startswith("text_encoders.")


@pytest.mark.parametrize("format", ["kohya", "comfyui", "diffusers"])
@pytest.mark.parametrize("family, variant", NAMES)
def test_every_format_is_written_and_read_back_without_a_host(
    tmp_path: Path, family: str, variant: str, format: str
) -> None:
    keymap, names = variant_key_map(family, variant), NAMES[family, variant]
    paths = list(dict.fromkeys(path for path, _ in names.values()))
    lora = LoraFile.from_state_dict(tensors_of(keymap, paths))
    assert lora.keymap is keymap
    lora.save(tmp_path / "x.safetensors", keymap, format=format)
    again = LoraFile.read(tmp_path / "x.safetensors")
    assert again.keymap is keymap and again.adapters.keys() == lora.adapters.keys() == set(paths)
    for path, adapter in lora.adapters.items():
        for name, tensor in adapter.tensors().items():
            assert torch.equal(again.adapters[path].tensors()[name], tensor)


def test_a_plain_lora_model_is_named_by_its_family(tmp_path: Path) -> None:
    tensors = tensors_of(variant_key_map("Flux", "dev"), [_FLUX])
    LoraModel(tensors).save(tmp_path / "x.safetensors", format="kohya")
    saved = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert "lora_unet_double_blocks_18_img_attn_qkv.lora_up.weight" in saved
    assert LoraModel(tensors).to_file().adapters.keys() == {_FLUX}


WAN_MODULATION = {  # what files call the parameters of Wan's blocks and head: (path, rows)
    "diffusion_model.blocks.3.diff_m": ("diffusion_model.blocks.3.modulation", 6),
    "lora_unet_blocks_3.diff_m": ("diffusion_model.blocks.3.modulation", 6),
    "diffusion_model.blocks.3.modulation.diff": ("diffusion_model.blocks.3.modulation", 6),
    "blocks.3.modulation.diff": ("diffusion_model.blocks.3.modulation", 6),
    "diffusion_model.head.modulation.diff": ("diffusion_model.head.modulation", 2),
}


@pytest.mark.parametrize("name", WAN_MODULATION)
def test_changes_of_wans_modulations_are_read(tmp_path: Path, name: str) -> None:
    """As in the few-step LoRAs of lightx2v, beside pairs, norms and biases."""
    path, rows = WAN_MODULATION[name]
    change = torch.randn(1, rows, 5120, generator=torch.Generator().manual_seed(0))
    keymap = variant_key_map("Wan", "14B")
    others = {
        **tensors_of(keymap, ["diffusion_model.blocks.3.self_attn.q"]),
        "diffusion_model.blocks.3.self_attn.q.diff_b": torch.ones(5120),
        "diffusion_model.blocks.3.self_attn.norm_q.diff": torch.ones(5120),
    }
    lora = LoraFile.from_state_dict({**others, name: change})
    assert lora.family == "Wan" and len(lora.adapters) == 4
    assert torch.equal(lora.adapters[path].delta(torch.zeros(change.shape)).detach(), change)
    for format in ("kohya", "comfyui"):  # under the only name that the host knows
        lora.save(tmp_path / "x.safetensors", keymap, format=format)
        written = safetensors.torch.load_file(tmp_path / "x.safetensors")
        assert torch.equal(written[f"{path}.diff"], change)
    with pytest.raises(LoraFileError, match="modulation: diffusers' name for it is not known"):
        lora.save(tmp_path / "x.safetensors", keymap, format="diffusers")


def test_modulations_of_another_size_are_refused() -> None:
    tensors = {"diffusion_model.blocks.3.diff_m": torch.ones(1, 6, 5121)}
    keymap = variant_key_map("Wan", "14B")
    with pytest.raises(LoraFileError, match=r"diff is \(1, 6, 5121\), expected \(1, 6, 5120\)"):
        LoraFile.from_state_dict(tensors, keymap)


@pytest.mark.parametrize("family, variant", VARIANTS)
def test_the_variant_is_told_by_shapes(family: str, variant: str) -> None:
    keymap = variant_key_map(family, variant)
    shapes = {}
    for path, layer in keymap.layers.items():
        shapes[f"{path}.lora_up.weight"] = (layer.shape[0], RANK)
        shapes[f"{path}.lora_down.weight"] = (RANK, *layer.shape[1:])
    assert family_key_map(family, shapes) is keymap


def test_without_shapes_the_most_usual_variant_counts() -> None:
    assert family_key_map("Wan") is variant_key_map("Wan", "14B")
    assert family_key_map("wan", {"x": (1,)}) is variant_key_map("Wan", "14B")


@pytest.mark.parametrize("family", ["SD2", "Pixart", "/etc/passwd", ""])
def test_another_family_is_refused_with_those_that_are_known(family: str) -> None:
    for call in (family_key_map, variants):
        with pytest.raises(ValueError, match="not known; known are SD1.5, SDXL, .* and Wan"):
            call(family)


def test_a_file_of_no_family_is_refused_with_the_reason(tmp_path: Path) -> None:
    tensors = {"x.lora_up.weight": torch.zeros(4, 1), "x.lora_down.weight": torch.zeros(1, 4)}
    with pytest.raises(ValueError, match="its family is not known by its layers; known are SD1.5"):
        key_map_for({name: tensor.shape for name, tensor in tensors.items()})
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(LoraFileError, match="x.safetensors: its family .* model loaded"):
        LoraFile.read(tmp_path / "x.safetensors")
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(LoraFileError, match="x.safetensors: (?!its family)"):
        LoraFile.read(tmp_path / "x.safetensors")
    with pytest.raises(LoraFileError, match="its family is not known"):
        LoraFile.from_state_dict(tensors)


def test_the_files_are_those_of_the_families_and_small() -> None:
    files = {family_file(family) for family in FAMILIES}
    assert files == set(FOLDER.glob("*.json"))
    assert sum(file.stat().st_size for file in files) < 600_000


LINES = [
    *({"at": f"blocks.{n}.mlp.{m}", "shape": [4, 4]} for n in range(12) for m in (0, 2)),
    *({"at": f"odd.{n}", "shape": [4, n + 1]} for n in range(3)),
    *({"at": f"same.{n}", "shape": [n]} for n in (3, 4)),
    *({"at": f"up.{n + 3}.q", "shape": [4], "table": f"down.{n + 3}.0.q"} for n in range(2)),
    {"at": "up.5.q", "shape": [4], "table": "down.6.0.q"},
    {"at": "x", "shape": [1]},
]


def test_runs_of_lines_are_grouped_and_expanded_again() -> None:
    short = grouped(LINES)
    assert {"at": "blocks.*.mlp.2", "*": [0, 11], "shape": [4, 4]} in short
    assert {"at": "up.*.q", "*": [3, 4], "shape": [4], "table": "down.*.0.q"} in short
    assert {"at": "up.5.q", "shape": [4], "table": "down.6.0.q"} in short
    # A number that is no part of a name never counts.
    assert {"at": "odd.0", "shape": [4, 1]} in short and {"at": "same.3", "shape": [3]} in short
    back = list(expanded(short))
    assert sorted(map(json.dumps, back)) == sorted(map(json.dumps, LINES))
    assert len(short) == 10 and list(islice(expanded(short), 1)) == [LINES[0]]
