"""Tiny real host models of each family, with seeded random weights, for tests on the host.

Letters in shapes: C latent channels, T frames, H and W latent height and width, N text tokens,
D text width.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import comfy.supported_models_base
import torch

CPU = torch.device("cpu")
Conditioning = list[list[Any]]  # the host's CONDITIONING: [[(1, N, D) tensor, {name: value}]]


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """What a family's tiny model is made of, and what it takes.

    Sizes are about the smallest that keep every kind of block of the family. Depths and hidden
    sizes, from which the host makes its aliases for LoRA keys, agree as they do in real models.
    """

    host_class: str  # in comfy.supported_models
    unet_config: Mapping[str, Any]
    params_class: str = ""  # a dataclass that differs by host; settings not in it are left out
    latent_shape: tuple[int, ...]  # (C, H, W) or (C, T, H, W), as the host has it without the batch
    context_shape: tuple[int, int]  # (N, D)
    pooled_width: int = 0  # 0: the conditioning has no pooled_output
    cond_options: Mapping[str, Any] = field(default_factory=dict)
    context_mask: bool = False  # the family's text encoder gives an attention_mask
    in_place: bool = False  # blocks add to their input in place (`img += ...`)


_UNET: dict[str, Any] = {  # what SD1.5 and SDXL share
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,  # two channels a group in GroupNorm; one would cancel the timestep
    "channel_mult": [1, 2],
    "num_res_blocks": [1, 1],
    "use_spatial_transformer": True,
    "transformer_depth_middle": 1,
    "context_dim": 48,
    "legacy": False,
}
_FLUX: dict[str, Any] = {  # what the Flux-type families share
    "context_in_dim": 48,
    "hidden_size": 64,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "patch_size": 2,
    "mlp_ratio": 2.0,
    "axes_dim": [8, 12, 12],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": False,
    "txt_ids_dims": [],
    "vec_in_dim": None,
}
_LUMINA: dict[str, Any] = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "multiple_of": 32,
    "qk_norm": True,
    "cap_feat_dim": 48,
}

FAMILIES: dict[str, FamilySpec] = {
    "SD1.5": FamilySpec(
        host_class="SD15",
        unet_config=_UNET
        | {
            "use_linear_in_transformer": False,
            "transformer_depth": [1, 1],
            "transformer_depth_output": [1, 1, 1, 1],
            "adm_in_channels": None,
        },
        latent_shape=(4, 8, 12),
        context_shape=(7, 48),
    ),
    "SDXL": FamilySpec(
        host_class="SDXL",
        unet_config=_UNET
        | {
            "use_linear_in_transformer": True,
            "transformer_depth": [0, 2],
            "transformer_depth_output": [0, 0, 2, 2],
            "num_classes": "sequential",
            "adm_in_channels": 48 + 6 * 256,  # pooled text, then six sizes of 256 each
        },
        latent_shape=(4, 8, 12),
        context_shape=(7, 48),
        pooled_width=48,
        cond_options={
            "width": 96,
            "height": 64,
            "crop_w": 0,
            "crop_h": 8,
            "target_width": 96,
            "target_height": 64,
        },
    ),
    "SD3": FamilySpec(
        host_class="SD3",
        unet_config={
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "depth": 2,  # the hidden size is 64 times this
            "input_size": None,
            "adm_in_channels": 48,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": 48, "out_features": 128},
            },
            "num_patches": 256,
            "pos_embed_max_size": 16,
            "pos_embed_scaling_factor": None,
            "qk_norm": "rms",
            "x_block_self_attn_layers": [],
        },
        latent_shape=(16, 8, 12),
        context_shape=(7, 48),
        pooled_width=48,
    ),
    "Flux": FamilySpec(
        host_class="Flux",
        unet_config=_FLUX
        | {
            "image_model": "flux",
            "in_channels": 16,
            "out_channels": 16,
            "vec_in_dim": 48,
            "guidance_embed": True,
        },
        params_class="comfy.ldm.flux.model.FluxParams",
        latent_shape=(16, 8, 12),
        context_shape=(7, 48),
        pooled_width=48,
        cond_options={"guidance": 3.5},
        in_place=True,
    ),
    "Flux2": FamilySpec(
        host_class="Flux2",
        unet_config=_FLUX
        | {
            "image_model": "flux2",
            "in_channels": 128,
            "out_channels": 128,
            "patch_size": 1,
            "axes_dim": [8, 8, 8, 8],
            "theta": 2000,
            "qkv_bias": False,
            "ops_bias": False,
            "guidance_embed": True,
            "global_modulation": True,
            "mlp_silu_act": True,
            "default_ref_method": "index",
            "ref_index_scale": 10.0,
            "txt_ids_dims": [3],
        },
        params_class="comfy.ldm.flux.model.FluxParams",
        latent_shape=(128, 4, 6),
        context_shape=(32, 48),  # the host pads it to 512 tokens
        pooled_width=48,  # not used by the model, but 0.3.75 requires it
        cond_options={"guidance": 3.5},
        in_place=True,
    ),
    "Chroma": FamilySpec(
        host_class="Chroma",
        unet_config=_FLUX
        | {
            "image_model": "chroma",
            "in_channels": 64,  # counted after patching, unlike Flux
            "out_channels": 64,
            "in_dim": 64,
            "out_dim": 64,
            "hidden_dim": 64,
            "n_layers": 2,
        },
        params_class="comfy.ldm.chroma.model.ChromaParams",
        latent_shape=(16, 8, 12),
        context_shape=(7, 48),
        pooled_width=48,  # not used by the model, but 0.3.75 requires it
        cond_options={"guidance": 0.0},
        in_place=True,
    ),
    "Lumina2": FamilySpec(
        host_class="Lumina2",
        unet_config=_LUMINA
        | {
            "dim": 96,
            "n_heads": 4,
            "n_kv_heads": 2,
            "axes_dims": [8, 8, 8],
            "axes_lens": [300, 512, 512],
            "rope_theta": 10000.0,
            "ffn_dim_multiplier": 2.0,
        },
        latent_shape=(16, 8, 12),
        context_shape=(7, 48),
        context_mask=True,
    ),
    "Z-Image": FamilySpec(
        host_class="ZImage",
        unet_config=_LUMINA
        | {
            "dim": 256,  # the modulation takes a timestep of exactly 256 channels
            "n_heads": 8,
            "n_kv_heads": 8,
            "axes_dims": [8, 12, 12],
            "axes_lens": [1536, 512, 512],
            "rope_theta": 256.0,
            "ffn_dim_multiplier": 0.5,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        },
        latent_shape=(16, 8, 12),
        context_shape=(7, 48),
        context_mask=True,
    ),
    "Qwen-Image": FamilySpec(
        host_class="QwenImage",
        unet_config={
            "image_model": "qwen_image",
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": 48,
            "axes_dims_rope": (8, 12, 12),
        },
        latent_shape=(16, 1, 8, 12),
        context_shape=(7, 48),
    ),
    "Wan": FamilySpec(
        host_class="WAN21_T2V",
        unet_config={
            "image_model": "wan2.1",
            "model_type": "t2v",
            "in_dim": 16,
            "out_dim": 16,
            "dim": 64,
            "ffn_dim": 128,
            "text_dim": 48,
            "num_heads": 2,
            "num_layers": 2,
        },
        latent_shape=(16, 2, 8, 12),
        context_shape=(7, 48),
    ),
    "HunyuanImage": FamilySpec(
        host_class="HunyuanImage21",
        unet_config=_FLUX
        | {
            "image_model": "hunyuan_video",
            "in_channels": 64,
            "out_channels": 64,
            "patch_size": [1, 1],
            "axes_dim": [16, 16],
            "theta": 256,
            "byt5": False,  # its sizes are fixed, seven million weights
            "meanflow": False,
            "meanflow_sum": False,
            "use_cond_type_embedding": False,
            "vision_in_dim": None,
        },
        params_class="comfy.ldm.hunyuan_video.model.HunyuanVideoParams",
        latent_shape=(64, 4, 6),
        context_shape=(7, 48),
        context_mask=True,
        in_place=True,
    ),
    "AuraFlow": FamilySpec(
        host_class="AuraFlow",
        unet_config={
            "max_seq": 256,
            "cond_seq_dim": 48,
            "dim": 64,
            "n_heads": 2,
            "n_double_layers": 1,
            "n_layers": 2,
            "global_conddim": 64,
        },
        latent_shape=(4, 8, 12),
        context_shape=(7, 48),
    ),
}


def build(
    name: str, *, dtype: torch.dtype = torch.float32, inference: bool = True, seed: int = 0
) -> comfy.model_patcher.ModelPatcher:
    """A new tiny model of family `name` on the CPU, its weights drawn from `seed`.

    inference=True builds it under inference mode as the host's executor does: all its tensors are
    inference tensors. inference=False gives normal ones, also when called under inference mode.
    Weights of different dtype but equal seed are the same numbers, rounded.
    """
    spec = FAMILIES[name]
    with torch.inference_mode(inference):
        config = getattr(comfy.supported_models, spec.host_class)(_unet_config(spec))
        config.set_inference_dtype(dtype, None)
        model = config.get_model({}, "", CPU)
        _fill(model.diffusion_model, torch.Generator().manual_seed(seed))
        return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


def latent(name: str, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Latent images as a VAE gives them ("samples"): (batch, *latent_shape), float32.

    Normal numbers, of mean 0 and deviation 1 after the model's own `process_latent_in`.
    """
    spec = FAMILIES[name]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((batch, *spec.latent_shape), generator=generator)
    return getattr(comfy.supported_models, spec.host_class).latent_format().process_out(noise)


def conditioning(name: str, seed: int = 0) -> Conditioning:
    """One prompt's conditioning in the host's form, with everything that the family reads."""
    spec = FAMILIES[name]
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn((1, *spec.context_shape), generator=generator)
    options = dict(spec.cond_options)
    if spec.pooled_width:
        options["pooled_output"] = torch.randn((1, spec.pooled_width), generator=generator)
    if spec.context_mask:
        options["attention_mask"] = torch.ones(1, spec.context_shape[0], dtype=torch.long)
    return [[context, options]]


# Settings as real models of the type have them, different from the default where any are.
_SAMPLING_SETTINGS: dict[str, dict[str, Any]] = {
    "V_PREDICTION": {"zsnr": True},
    "V_PREDICTION_EDM": {"sigma_min": 0.002, "sigma_max": 700.0},
    "STABLE_CASCADE": {"shift": 2.0},
    "EDM": {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0},
    "FLOW": {"shift": 3.0},
    "V_PREDICTION_CONTINUOUS": {"sigma_min": 0.03, "sigma_max": 500.0},
    "FLUX": {"shift": 1.15},
    "FLOW_COSMOS": {"sigma_data": 1.0, "sigma_min": 0.002, "sigma_max": 80.0},
    "V_PREDICTION_DDPM": {"zsnr": True},
    "FLOW_AV": {"shift": 12.0, "audio_shift": 3.0},
}
# name of each ModelType that this host has -> the settings that `model_sampling` gives it
MODEL_TYPES: dict[str, dict[str, Any]] = {
    member.name: _SAMPLING_SETTINGS.get(member.name, {}) for member in comfy.model_base.ModelType
}


def model_sampling(model_type: str, **settings: Any) -> torch.nn.Module:
    """The host's model_sampling of a type in MODEL_TYPES; `settings` override those there."""
    config = comfy.supported_models_base.BASE({})
    config.sampling_settings.update(MODEL_TYPES[model_type] | settings)
    member = comfy.model_base.ModelType[model_type]
    return comfy.model_base.model_sampling(config, member)


def _unet_config(spec: FamilySpec) -> dict[str, Any]:
    """The settings that this host's version of the family knows."""
    if not spec.params_class:
        return dict(spec.unet_config)
    module, _, class_name = spec.params_class.rpartition(".")
    known = {f.name for f in fields(getattr(importlib.import_module(module), class_name))}
    return {k: v for k, v in spec.unet_config.items() if k in known or k == "image_model"}


def _fill(network: torch.nn.Module, generator: torch.Generator) -> None:
    """Random numbers in every floating-point parameter and buffer, whatever the host left there.

    Matrices and kernels, also those that training starts at zero (output layers, gates), get
    variance 1.5/fan-in: 1 leaves gates behind two activations too small for the text to show, and
    2 lets outputs grow to many times the target's size. Norms are near one, biases near zero.
    """
    with torch.no_grad():
        for module in network.modules():
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            for name, tensor in own:
                if not tensor.is_floating_point():
                    continue
                noise = torch.randn(tensor.shape, generator=generator)
                if tensor.ndim == 1:
                    noise = 0.1 * noise if name == "bias" else 1 + 0.1 * noise
                elif name == "weight":
                    noise *= (1.5 / tensor[0].numel()) ** 0.5
                else:  # position tables, learned tokens, modulation offsets
                    noise *= 0.5
                tensor.copy_(noise)
