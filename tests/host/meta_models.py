"""The host's models with their real sizes, without weights: for names and shapes alone.

Depths are real where a family is told by them, else a few blocks.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field, fields
from typing import Any

import comfy.model_patcher
import comfy.supported_models
import torch

META = torch.device("meta")


@dataclass(frozen=True, kw_only=True)
class MetaSpec:
    """What the host's config of a model detects from a checkpoint; see families.FamilySpec."""

    host_class: str  # in comfy.supported_models, whose own settings are used, too
    unet_config: dict[str, Any] = field(default_factory=dict)
    params_class: str = ""


_UNET: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "legacy": False,
}
_SD: dict[str, Any] = _UNET | {
    "channel_mult": [1, 2, 4, 4],
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
}
_XL: dict[str, Any] = _UNET | {
    "channel_mult": [1, 2, 4],
    "num_res_blocks": [2, 2, 2],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "num_classes": "sequential",
}


def _sd3(depth: int) -> dict[str, Any]:
    return {
        "out_channels": 16,
        "patch_size": 2,
        "depth": depth,
        "input_size": None,
        "adm_in_channels": 2048,
        "context_embedder_config": {
            "target": "torch.nn.Linear",
            "params": {"in_features": 4096, "out_features": 64 * depth},
        },
        "num_patches": 256,
        "pos_embed_max_size": 16,
        "qk_norm": "rms",
        "x_block_self_attn_layers": [],
    }


_FLUX: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
_CHROMA: dict[str, Any] = _FLUX | {
    "in_channels": 64,
    "out_channels": 64,
    "in_dim": 64,
    "out_dim": 3072,
    "hidden_dim": 5120,
    "n_layers": 5,
    "guidance_embed": False,
}
_HUNYUAN: dict[str, Any] = _FLUX | {
    "patch_size": [1, 2, 2],
    "depth": 20,
    "depth_single_blocks": 40,
    "theta": 256,
    "byt5": False,
    "meanflow": False,
    "meanflow_sum": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
}
_COSMOS: dict[str, Any] = {
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "num_blocks": 2,
    "concat_padding_mask": True,
    "pos_emb_cls": "rope3d",
    "use_adaln_lora": True,
    "adaln_lora_dim": 256,
}
_WAN: dict[str, Any] = {
    "dim": 5120,
    "ffn_dim": 13824,
    "num_heads": 40,
    "num_layers": 2,
    "in_dim": 16,
    "out_dim": 16,
}
_FLUX_PARAMS = "comfy.ldm.flux.model.FluxParams"
_HUNYUAN_PARAMS = "comfy.ldm.hunyuan_video.model.HunyuanVideoParams"

# {name: what it is}. The part before a space is the label that its LoRAs should get.
MODELS: dict[str, MetaSpec] = {
    "SD1.5": MetaSpec(host_class="SD15", unet_config=_SD),
    "SD2": MetaSpec(host_class="SD20", unet_config=_SD),
    "SDXL": MetaSpec(host_class="SDXL", unet_config=_XL),
    "SD3 medium": MetaSpec(host_class="SD3", unet_config=_sd3(24)),
    "SD3 large": MetaSpec(host_class="SD3", unet_config=_sd3(38)),
    "Flux": MetaSpec(host_class="Flux", unet_config=_FLUX, params_class=_FLUX_PARAMS),
    "Flux2": MetaSpec(
        host_class="Flux2",
        unet_config=_FLUX
        | {
            "in_channels": 128,
            "out_channels": 128,
            "patch_size": 1,
            "vec_in_dim": None,
            "context_in_dim": 15360,
            "hidden_size": 6144,
            "mlp_ratio": 3.0,
            "num_heads": 48,
            "depth": 8,
            "depth_single_blocks": 48,
            "axes_dim": [32, 32, 32, 32],
            "qkv_bias": False,
            "ops_bias": False,
            "global_modulation": True,
            "mlp_silu_act": True,
            "txt_ids_dims": [3],
        },
        params_class=_FLUX_PARAMS,
    ),
    "Chroma": MetaSpec(
        host_class="Chroma",
        unet_config=_CHROMA,
        params_class="comfy.ldm.chroma.model.ChromaParams",
    ),
    "HunyuanVideo": MetaSpec(
        host_class="HunyuanVideo", unet_config=_HUNYUAN, params_class=_HUNYUAN_PARAMS
    ),
    "HunyuanVideo 1.5": MetaSpec(
        host_class="HunyuanVideo15",
        unet_config=_HUNYUAN
        | {
            "in_channels": 65,
            "out_channels": 32,
            "patch_size": [1, 1, 1],
            "vec_in_dim": None,
            "context_in_dim": 3584,
            "hidden_size": 2048,
            "num_heads": 16,
            "depth": 54,
            "depth_single_blocks": 0,
            "guidance_embed": False,
            "byt5": True,
            "use_cond_type_embedding": True,
            "vision_in_dim": 1152,
        },
        params_class=_HUNYUAN_PARAMS,
    ),
    "HunyuanImage21": MetaSpec(
        host_class="HunyuanImage21",
        unet_config=_HUNYUAN
        | {
            "in_channels": 64,
            "out_channels": 64,
            "patch_size": [1, 1],
            "vec_in_dim": None,
            "context_in_dim": 3584,
            "hidden_size": 3584,
            "num_heads": 28,
            "axes_dim": [64, 64],
            "guidance_embed": False,
            "byt5": True,
        },
        params_class=_HUNYUAN_PARAMS,
    ),
    "Lumina2": MetaSpec(
        host_class="Lumina2",
        unet_config={
            "patch_size": 2,
            "in_channels": 16,
            "dim": 2304,
            "cap_feat_dim": 2304,
            "n_layers": 2,
            "n_heads": 24,
            "n_kv_heads": 8,
            "qk_norm": True,
            "axes_dims": [32, 32, 32],
            "axes_lens": [300, 512, 512],
        },
    ),
    "Z-Image": MetaSpec(
        host_class="ZImage",
        unet_config={
            "patch_size": 2,
            "in_channels": 16,
            "dim": 3840,
            "cap_feat_dim": 2560,
            "n_layers": 2,
            "n_heads": 30,
            "n_kv_heads": 30,
            "qk_norm": True,
            "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
            "ffn_dim_multiplier": 8.0 / 3.0,
            "z_image_modulation": True,
        },
    ),
    "Qwen-Image": MetaSpec(
        host_class="QwenImage", unet_config={"num_layers": 60, "in_channels": 64}
    ),
    "Wan": MetaSpec(host_class="WAN21_T2V", unet_config=_WAN),
    "Wan image to video": MetaSpec(host_class="WAN21_I2V", unet_config=_WAN | {"in_dim": 36}),
    "Wan VACE": MetaSpec(
        host_class="WAN21_Vace", unet_config=_WAN | {"vace_layers": 2, "vace_in_dim": 96}
    ),
    "Wan camera": MetaSpec(host_class="WAN21_Camera", unet_config=_WAN | {"in_dim": 32}),
    "Wan animate": MetaSpec(host_class="WAN22_Animate", unet_config=_WAN | {"in_dim": 36}),
    # Families that have no label: any of the above would be wrong.
    "? AuraFlow": MetaSpec(host_class="AuraFlow", unet_config={"n_layers": 6}),
    "? HunyuanDiT": MetaSpec(host_class="HunyuanDiT", unet_config={"depth": 2}),
    "? LTXV": MetaSpec(host_class="LTXV", unet_config={"num_layers": 2}),
    "? Mochi": MetaSpec(
        host_class="GenmoMochi",
        unet_config={
            "depth": 2,
            "patch_size": 2,
            "num_heads": 24,
            "hidden_size_x": 3072,
            "hidden_size_y": 1536,
            "mlp_ratio_x": 4.0,
            "mlp_ratio_y": 4.0,
            "learn_sigma": False,
            "attn_drop": 0.0,
            "patch_embed_bias": True,
            "timestep_mlp_bias": True,
            "in_channels": 12,
            "qk_norm": True,
            "qkv_bias": False,
            "use_t5": True,
            "t5_feat_dim": 4096,
            "t5_token_length": 256,
        },
    ),
    "? Cosmos": MetaSpec(
        host_class="CosmosT2V",
        unet_config=_COSMOS
        | {"model_channels": 4096, "num_heads": 32, "block_config": "FA-CA-MLP"}
        | {"block_x_format": "THWBD", "affline_emb_norm": True},
    ),
    "? Cosmos Predict2": MetaSpec(
        host_class="CosmosT2IPredict2",
        unet_config=_COSMOS | {"model_channels": 2048, "num_heads": 16},
    ),
    "? HiDream": MetaSpec(
        host_class="HiDream",
        unet_config={
            "attention_head_dim": 128,
            "axes_dims_rope": [64, 32, 32],
            "caption_channels": [4096, 4096],
            "max_resolution": [128, 128],
            "in_channels": 16,
            "llama_layers": [0, 1, 2, 3],
            "num_attention_heads": 20,
            "num_routed_experts": 4,
            "num_activated_experts": 2,
            "num_layers": 2,
            "num_single_layers": 2,
            "out_channels": 16,
            "patch_size": 2,
            "text_emb_dim": 2048,
        },
    ),
    "? ACEStep": MetaSpec(host_class="ACEStep"),
    "? Omnigen2": MetaSpec(
        host_class="Omnigen2",
        unet_config={"num_layers": 2, "hidden_size": 2520, "num_attention_heads": 21}
        | {"num_kv_heads": 7, "axes_dim_rope": (40, 40, 40)},
    ),
    "? Hunyuan3D": MetaSpec(host_class="Hunyuan3Dv2"),
    "? Hunyuan3D 2.1": MetaSpec(host_class="Hunyuan3Dv2_1"),
    "? SDXL refiner": MetaSpec(
        host_class="SDXLRefiner",
        unet_config=_XL
        | {
            "channel_mult": [1, 2, 4, 4],
            "num_res_blocks": [2, 2, 2, 2],
            "transformer_depth_output": [0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0],
            "transformer_depth_middle": 4,
        },
    ),
    "? Stable Video": MetaSpec(
        host_class="SVD_img2vid",
        unet_config=_SD
        | {
            "in_channels": 8,
            "num_classes": "sequential",
            "extra_ff_mix_layer": True,
            "use_spatial_context": True,
            "merge_strategy": "learned_with_images",
            "merge_factor": 0.0,
            "video_kernel_size": [3, 1, 1],
        },
    ),
}


def build_meta(name: str) -> comfy.model_patcher.ModelPatcher:
    """The model with all its tensors on the meta device."""
    spec = MODELS[name]
    kind = getattr(comfy.supported_models, spec.host_class)
    settings = {**kind.unet_config, **spec.unet_config}
    if spec.params_class:
        module, _, class_name = spec.params_class.rpartition(".")
        known = {f.name for f in fields(getattr(importlib.import_module(module), class_name))}
        settings = {k: v for k, v in settings.items() if k in known or k == "image_model"}
    with META:
        config = kind(settings)
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}, "", META)
        return comfy.model_patcher.ModelPatcher(model, load_device=META, offload_device=META)
