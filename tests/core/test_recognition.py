"""Family and dialect of LoRA files, and what a header alone tells."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lora_weave.lora_core.inspection import inspect_file
from lora_weave.lora_core.lora_file import KeyMap, LayerKey, LoraFile
from lora_weave.lora_core.recognition import dialect_of, recognise

KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_"
DOWN = ".lora_down.weight"
FLUX = "lora_unet_double_blocks_0_img_attn_qkv"
HUNYUAN = "HunyuanVideo"
REFINER = "transformer.context_embedder.token_refiner.refiner_blocks."


@pytest.mark.parametrize(
    "name, shape, family",
    [
        (KOHYA + "attn2_to_k" + DOWN, (4, 768), "SD1.5"),
        (KOHYA + "attn2_to_v" + DOWN, (4, 1024), "SD2"),
        ("unet.down_blocks.1.attn2.to_k.lora_A.weight", (4, 2048), "SDXL"),
        ("unet.down_blocks.1.attn2.processor.to_k_lora.down.weight", (4, 2048), "SDXL"),
        ("base_model.model.down_blocks.1.attn2.to_k.lora_A.default.weight", (4, 768), "SD1.5"),
        ("lycoris_down_blocks_1_attn2_to_k.hada_w1_b", (4, 768), "SD1.5"),
        ("unet.mid_block.attn2.to_k.diff", (320, 768), "SD1.5"),
        (KOHYA + "attn2_to_k.lora_up.weight", (768, 4), None),
        ("lora_unet_input_blocks_7_1_transformer_blocks_5_attn1_to_q" + DOWN, (4, 1280), "SDXL"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1" + DOWN, (4, 9), "SDXL"),
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_q" + DOWN, (4, 9), "SD3"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1" + DOWN, (4, 9), None),
        ("lora_unet_joint_blocks_0_context_block_attn_qkv" + DOWN, (4, 9), "SD3"),
        ("transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight", (4, 1536), "SD3"),
        ("transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight", (4, 3072), "Flux"),
        (
            "transformer.transformer_blocks.40.attn.add_q_proj.lora_A.weight",
            (4, 3072),
            "Qwen-Image",
        ),
        ("lora_transformer_transformer_blocks_3_attn_to_q" + DOWN, (4, 2432), "SD3"),
        (FLUX + DOWN, (4, 3072), "Flux"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", (4, 3072), "Flux"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight", (9, 4), "Flux"),
        ("transformer.single_transformer_blocks.38.attn.to_q.lora_A.weight", (4, 3072), HUNYUAN),
        ("lora_unet_double_blocks_19_img_attn_qkv" + DOWN, (4, 3072), HUNYUAN),
        ("lora_unet_double_blocks_0_img_mlp_fc1" + DOWN, (4, 3072), HUNYUAN),
        ("lora_unet_single_blocks_0_modulation_linear" + DOWN, (4, 3072), HUNYUAN),
        (REFINER + "0.attn.to_q.lora_A.weight", (4, 3072), None),
        ("lora_unet_double_blocks_53_txt_attn_proj" + DOWN, (4, 2048), "HunyuanVideo15"),
        ("lora_unet_double_blocks_2_img_attn_qkv" + DOWN, (4, 3584), "HunyuanImage21"),
        ("lora_unet_double_blocks_2_img_attn_qkv" + DOWN, (4, 1024), None),  # Hunyuan3D
        ("transformer.transformer_blocks.19.attn.to_q.lora_A.weight", (4, 3072), None),
        ("transformer.joint_transformer_blocks.1.attn.to_q.lora_A.weight", (4, 3072), None),
        ("transformer.single_transformer_blocks.9.attn.to_out.0.lora_A.weight", (4, 3072), None),
        # Others that are named alike
        ("lora_unet_blocks_3_cross_attn_q_linear" + DOWN, (4, 1152), None),  # PixArt
        ("diffusion_model.blocks.3.self_attn.q_proj.lora_A.weight", (4, 2048), None),  # Cosmos
        ("transformer.blocks.3.attn2.to_k.lora_A.weight", (4, 1408), None),  # HunyuanDiT
        ("transformer.transformer_blocks.3.attn2.to_k.lora_A.weight", (4, 2048), None),  # LTXV
        ("transformer.transformer_blocks.3.attn2.to_k.lora_A.weight", (4, 1152), None),  # PixArt
        (
            "transformer.transformer_blocks.3.attn1.add_q_proj.lora_A.weight",
            (4, 1536),
            None,
        ),  # Mochi
        ("transformer_blocks.3.attn.to_q.lora_A.weight", (4, 2560), None),  # ACE-Step
        ("transformer.layers.3.attn.to_q.lora_A.weight", (4, 2520), None),  # OmniGen2
        ("double_blocks.0.processor.qkv_lora1.down.weight", (4, 3072), "Flux"),
        (FLUX + DOWN, (4, 6144), "Flux2"),
        ("transformer.single_stream_modulation.linear.lora_A.weight", (4, 9), "Flux2"),
        ("diffusion_model.distilled_guidance_layer.in_proj.lora_A.weight", (4, 64), "Chroma"),
        ("transformer_blocks.3.img_mlp.net.2.lora_A.weight", (4, 9), "Qwen-Image"),
        ("lora_unet_transformer_blocks_3_txt_mod_1" + DOWN, (4, 9), "Qwen-Image"),
        ("diffusion_model.blocks.3.cross_attn.k.lora_A.weight", (4, 9), "Wan"),
        ("lora_unet_blocks_3_cross_attn_k" + DOWN, (4, 9), "Wan"),
        ("transformer.blocks.3.attn2.to_k.lora_A.weight", (4, 9), "Wan"),
        ("diffusion_model.layers.3.attention.qkv.lora_A.weight", (4, 2304), "Lumina2"),
        ("transformer.layers.3.attn.to_q.lora_A.weight", (4, 2304), "Lumina2"),
        ("diffusion_model.layers.3.attention.qkv.lora_A.weight", (4, 3840), "Z-Image"),
        ("transformer.layers.3.attention.to_q.lora_A.weight", (4, 3840), "Z-Image"),
        ("diffusion_model.something.lora_A.weight", (4, 9), None),
        ("text_encoder.encoder.layers.3.attention.q.lora_A.weight", (4, 9), None),
    ],
)
def test_families_are_recognised(name: str, shape: tuple[int, ...], family: str | None) -> None:
    assert recognise({name: shape}) == family


@pytest.mark.parametrize(
    "name",
    [
        "down_blocks." + "attn2." * 60_000 + "x",
        f"transformer_blocks.{'1' * 5000}.attn.to_q",
        f"double_blocks.{'1' * 5000}.img_attn.qkv",
        f"single_blocks.{'1' * 60_000}.linear1",
    ],
    ids=["attn2", "joint", "double", "single"],
)
def test_hostile_names_are_recognised_in_no_time(name: str) -> None:
    """The first took 37 s; Python makes no number of so many digits."""
    started = time.perf_counter()
    assert recognise({name + DOWN: (4, 3072)}) in (None, "Flux")
    assert time.perf_counter() - started < 3


def test_cross_attention_anywhere_tells_other_models() -> None:
    joint = {"transformer.transformer_blocks.3.attn.to_q" + DOWN: (4, 3072)}
    cross = {"transformer.transformer_blocks.3.attn2.to_k" + DOWN: (4, 3072)}
    assert recognise(joint) == "Flux"
    assert recognise(joint | cross) is recognise(cross | joint) is None


def test_widths_of_text_encoders_do_not_count() -> None:
    """SDXL has none of 768 columns, its first text encoder has."""
    unet = {"lora_unet_input_blocks_7_1_transformer_blocks_5_attn1_to_q" + DOWN: (4, 1280)}
    text = {"lora_te1_text_model_encoder_layers_0_mlp_fc1" + DOWN: (4, 768)}
    assert recognise(unet | text) == "SDXL"


def test_a_pair_tells_more_than_half_of_it() -> None:
    module = "diffusion_model.single_blocks.3.linear1"
    down = {f"{module}.lora_A.weight": (4, 3072)}
    assert recognise(down | {f"{module}.lora_B.weight": (7 * 3072, 4)}) == "Flux"
    assert recognise(down | {f"{module}.lora_B.weight": (9 * 3072, 4)}) == "Flux2"
    lokr = "unet.down_blocks.0.attn2.to_k.lokr_"
    assert recognise({f"{lokr}w1": (4, 16), f"{lokr}w2_a": (80, 2), f"{lokr}w2_b": (2, 48)}) == (
        "SD1.5"
    )


@pytest.mark.parametrize(
    "metadata, name, family",
    [
        ({"ss_base_model_version": "sd_v1"}, "lora_unet_odd", "SD1.5"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "lora_unet_odd", "SDXL"),
        ({"modelspec.architecture": "stable-diffusion-v2-512/lora"}, "lora_unet_odd", "SD2"),
        ({"modelspec.architecture": "Flux.2-dev/lora"}, "lora_unet_odd", "Flux2"),
        ({"ss_base_model_version": "wan2.1"}, "lora_unet_odd", "Wan"),
        ({"ss_base_model_version": "chroma"}, FLUX, "Chroma"),
        ({"ss_base_model_version": "sd_v1"}, FLUX, "Flux"),  # names are more to be trusted
        ({"ss_base_model_version": "other"}, "lora_unet_odd", None),
        ({"modelspec.architecture": "hunyuan-video"}, "lora_unet_odd", "HunyuanVideo"),
    ],
)
def test_metadata_counts_where_names_leave_it_open(
    metadata: dict[str, str], name: str, family: str | None
) -> None:
    assert recognise({name + DOWN: (4, 3072)}, metadata) == family


@pytest.mark.parametrize(
    "name, dialect",
    [
        (KOHYA + "attn2_to_k" + DOWN, "kohya"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha", "kohya"),
        ("oft_unet_input_blocks_1.oft_blocks", "kohya"),
        ("unet.mid_block.attn2.to_k.lora_A.weight", "diffusers"),
        ("text_encoder.text_model.lora_linear_layer.down.weight", "diffusers"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "diffusers"),
        ("unet.mid_block.attn2.processor.to_k_lora.down.weight", "old diffusers"),
        ("mid_block.attn2.processor.to_k_lora.down.weight", "old diffusers"),
        ("base_model.model.mid_block.attn2.to_k.lora_A.default.weight", "PEFT"),
        ("unet.base_model.model.mid_block.attn2.to_k.lora_A.weight", "PEFT"),
        ("diffusion_model.blocks.3.cross_attn.k.lora_A.weight", "comfyui"),
        ("text_encoders.clip_l.transformer.x.lora_up.weight", "comfyui"),
        ("model.diffusion_model.out.2.lora_up.weight", "raw"),
        ("lycoris_mid_block_attn2_to_k.lokr_w1", "LyCORIS"),
        ("lora_transformer_single_transformer_blocks_0_attn_to_q" + DOWN, "OneTrainer"),
        ("double_blocks.0.processor.qkv_lora1.down.weight", "XLabs"),
        ("transformer_blocks.3.img_mlp.net.2.lora_A.weight", "bare"),
        ("some.weight", ""),
    ],
)
def test_dialects(name: str, dialect: str) -> None:
    assert dialect_of([name]) == dialect


# Headers


def header_only(path: Path, entries: dict[str, Any], size: int, metadata: dict[str, str]) -> None:
    """A file whose header says `entries`, and whose body is a hole of `size` bytes."""
    text = json.dumps({"__metadata__": metadata, **entries}).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)


def large_file(path: Path, modules: int = 264) -> int:
    entries, offset = {}, 0
    for index in range(modules):
        name = f"lora_unet_down_blocks_{index}_attn2_to_k"
        for ending, shape in (("lora_up", (1280, 32)), ("lora_down", (32, 3700))):
            size = 4 * shape[0] * shape[1]
            entries[f"{name}.{ending}.weight"] = {
                **{"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
            }
            offset += size
    header_only(path, entries, offset, {"ss_base_model_version": "sdxl_base_v1-0"})
    return offset


def test_a_large_file_is_inspected_by_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """170 MB, of which nothing but the header is read."""
    path = tmp_path / "x.safetensors"
    size = large_file(path)
    assert size > 160_000_000
    read = []
    real_read = os.read

    class Counting:
        def __init__(self, name: Path) -> None:
            self.file = os.open(name, os.O_RDONLY)

        def __enter__(self) -> Counting:
            return self

        def __exit__(self, *_: object) -> None:
            os.close(self.file)

        def fileno(self) -> int:
            return self.file

        def seek(self, offset: int) -> None:
            os.lseek(self.file, offset, os.SEEK_SET)

        def read(self, count: int) -> bytes:
            read.append(count)
            return real_read(self.file, count)

    monkeypatch.setattr(
        "lora_weave.lora_core.safetensors_file.open",
        lambda name, mode: Counting(name),
        raising=False,
    )
    started = time.perf_counter()
    inspection = inspect_file(path)
    assert time.perf_counter() - started < 2
    assert sum(read) < 100_000
    assert inspection.num_bytes == size
    assert inspection.ranks == {32: 264} and inspection.types == {"lora": 264}
    assert (inspection.family, inspection.dialect) == ("SDXL", "kohya")
    assert inspection.dtypes == {"F32": 528}
    assert inspection.metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    name = "lora_unet_down_blocks_0_attn2_to_k.lora_up.weight"
    assert inspection.tensors[name].shape == (1280, 32)


def test_inspection_tells_types_apart(tmp_path: Path) -> None:
    tensors = {
        "lycoris_a.lokr_w1": torch.ones(2, 2),
        "lycoris_a.lokr_w2": torch.ones(2, 2),
        "lycoris_b.lora_down.weight": torch.ones(3, 2),
        "lycoris_b.lora_up.weight": torch.ones(2, 3),
        "lycoris_c.lora_up.weight": torch.ones(2, 3),
        "lycoris_d.set_weight": torch.ones(2),
        "lycoris_e.diff_b": torch.ones(2),
    }
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    found = inspect_file(tmp_path / "x.safetensors")
    assert found.types == {"lokr": 1, "lora": 1, "?": 1, "set": 1, "bias": 1}
    assert found.ranks == {3: 1}
    assert (found.family, found.dialect) == (None, "LyCORIS")


def test_a_read_file_says_its_family_and_dialect(tmp_path: Path) -> None:
    layer = LayerKey("diffusion_model.input_blocks.1.attn2.to_k", (8, 768), "lora_unet_k")
    tensors = {
        "diffusion_model.input_blocks.1.attn2.to_k.lora_A.weight": torch.ones(2, 768),
        "diffusion_model.input_blocks.1.attn2.to_k.lora_B.weight": torch.ones(8, 2),
    }
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    lora = LoraFile.read(tmp_path / "x.safetensors", KeyMap("SD1.5", {layer.path: layer}))
    assert (lora.family, lora.dialect) == ("SD1.5", "comfyui")
