"""The models of which `lora_core/families` has the layers, as the host builds them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Settings = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Family:
    """The host's class of a family, the settings of its variants, and its text encoders.

    The settings are what the host's comfy/model_detection.py finds in a checkpoint. `encoders` is
    the class of the host's that holds them, or "function()" that makes it. `variant_classes` are
    the host's classes of those variants that have one of their own.
    """

    host_class: str  # in comfy.supported_models
    variants: Mapping[str, Settings]
    encoders: str
    variant_classes: Mapping[str, str] = field(
        default_factory=dict
    )  # where a variant has a class of its own


_SD15 = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "channel_mult": [1, 2, 4, 4],
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "context_dim": 768,
    "adm_in_channels": None,
    "legacy": False,
}
_SDXL = _SD15 | {
    "channel_mult": [1, 2, 4],
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "use_linear_in_transformer": True,
    "context_dim": 2048,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}


def _sd3(depth: int, positions: int, qk_norm: str | None, own_attention: int) -> Settings:
    return {
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "depth": depth,  # the hidden size is 64 times this
        "input_size": None,
        "adm_in_channels": 2048,
        "context_embedder_config": {
            "target": "torch.nn.Linear",
            "params": {"in_features": 4096, "out_features": 64 * depth},
        },
        "num_patches": positions**2,
        "pos_embed_max_size": positions,
        "pos_embed_scaling_factor": None,
        "x_block_self_attn_layers": list(range(own_attention)),
        **({"qk_norm": qk_norm} if qk_norm else {}),
    }


_FLUX = {
    "image_model": "flux",
    "in_channels": 16,  # of the latent; the layer takes 4 pixels of each
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
    "txt_ids_dims": [],  # of newer hosts
}
_LUMINA2 = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 2304,
    "cap_feat_dim": 2304,
    "n_layers": 26,
    "qk_norm": True,
    "n_heads": 24,
    "n_kv_heads": 8,
    "axes_dims": [32, 32, 32],
    "axes_lens": [300, 512, 512],
    "rope_theta": 10000.0,
    "ffn_dim_multiplier": 4.0,
}
_Z_IMAGE = _LUMINA2 | {
    "dim": 3840,
    "cap_feat_dim": 2560,
    "n_layers": 30,
    "n_heads": 30,
    "n_kv_heads": 30,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8.0 / 3.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}


def _wan(dim: int, ffn_dim: int, layers: int, kind: str = "t2v", **more: Any) -> Settings:
    channels = {"in_dim": 16, "out_dim": 16}
    return {
        "image_model": "wan2.1",
        "model_type": kind,
        "dim": dim,
        "ffn_dim": ffn_dim,
        "num_heads": dim // 128,
        "num_layers": layers,
        **channels,
        **more,
    }


_WAN_SMALL, _WAN_LARGE = (1536, 8960, 30), (5120, 13824, 40)
FAMILIES = {
    "SD1.5": Family(
        host_class="SD15",
        variants={"base": _SD15, "inpainting": _SD15 | {"in_channels": 9}},
        encoders="comfy.sd1_clip.SD1ClipModel",
    ),
    "SDXL": Family(
        host_class="SDXL",
        variants={"base": _SDXL, "inpainting": _SDXL | {"in_channels": 9}},
        encoders="comfy.sdxl_clip.SDXLClipModel",
    ),
    "SD3": Family(
        host_class="SD3",
        variants={
            "medium": _sd3(24, 192, None, 0),
            "3.5 medium": _sd3(24, 384, "rms", 13),
            "3.5 large": _sd3(38, 192, "rms", 0),
        },
        encoders="comfy.text_encoders.sd3_clip.sd3_clip()",
    ),
    "Flux": Family(  # schnell has the layers of dev but guidance_in
        host_class="Flux",
        variants={
            "dev": _FLUX,
            "fill": _FLUX | {"in_channels": 96},
            "control": _FLUX | {"in_channels": 32},
        },
        encoders="comfy.text_encoders.flux.flux_clip()",
    ),
    "Lumina2": Family(
        host_class="Lumina2",
        variants={"2.0": _LUMINA2},
        encoders="comfy.text_encoders.lumina2.te()",
    ),
    "Z-Image": Family(
        host_class="ZImage",
        variants={"base": _Z_IMAGE},
        encoders="comfy.text_encoders.z_image.te()",
    ),
    "Qwen-Image": Family(
        host_class="QwenImage",
        variants={"base": {"image_model": "qwen_image", "in_channels": 64, "num_layers": 60}},
        encoders="comfy.text_encoders.qwen_image.te()",
    ),
    "Wan": Family(
        host_class="WAN21_T2V",
        variants={
            "14B": _wan(*_WAN_LARGE),
            "1.3B": _wan(*_WAN_SMALL),
            "2.2 14B image": _wan(*_WAN_LARGE, in_dim=36),
            "14B image": _wan(*_WAN_LARGE, "i2v", in_dim=36),
            "1.3B image": _wan(*_WAN_SMALL, "i2v", in_dim=36),
            "2.2 5B": _wan(3072, 14336, 30, in_dim=48, out_dim=48),
            "14B VACE": _wan(*_WAN_LARGE, "vace", vace_in_dim=96, vace_layers=8),
            "1.3B VACE": _wan(*_WAN_SMALL, "vace", vace_in_dim=96, vace_layers=15),
        },
        variant_classes={
            "14B image": "WAN21_I2V",
            "1.3B image": "WAN21_I2V",
            "2.2 5B": "WAN22_T2V",
            "14B VACE": "WAN21_Vace",
            "1.3B VACE": "WAN21_Vace",
        },
        encoders="comfy.text_encoders.wan.te()",
    ),
}


def model(label: str, variant: str) -> Any:
    """The host's `BaseModel` of a variant, on the meta device: shapes without numbers."""
    import comfy.supported_models
    import torch

    family = FAMILIES[label]
    host_class = family.variant_classes.get(variant, family.host_class)
    settings = dict(family.variants[variant])
    if label == "Flux":  # refuses settings that it does not know
        known = importlib.import_module("comfy.ldm.flux.model").FluxParams.__dataclass_fields__
        settings = {key: settings[key] for key in settings if key in {*known, "image_model"}}
    config = getattr(comfy.supported_models, host_class)(settings)
    return config.get_model({}, "", torch.device("meta"))


def encoders(label: str) -> Any:
    """The text encoders of a family on the meta device, as the host's CLIP holds them."""
    import torch

    module, _, name = FAMILIES[label].encoders.rpartition(".")
    made = getattr(importlib.import_module(module), name.removesuffix("()"))
    encoder_class = made() if name.endswith("()") else made
    return encoder_class(device=torch.device("meta"), dtype=torch.float32, model_options={})
