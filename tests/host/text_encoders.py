"""Tiny real CLIPs of the host, with seeded random weights, for tests on the host."""

from __future__ import annotations

import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models_base
import comfy.text_encoders.flux
import comfy.text_encoders.sd3_clip
import torch

from .families import CPU

_CLIP = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
_T5 = {"d_model": 64, "d_ff": 128, "d_kv": 32, "num_heads": 2, "num_layers": 2}
_SIZES = {  # what the host lets the caller change of each encoder's settings
    "clip_l_model_config": {**_CLIP, "num_hidden_layers": 3},
    "clip_g_model_config": {**_CLIP, "num_hidden_layers": 3},
    "t5xxl_model_config": _T5,
}
_sd3, _flux = comfy.text_encoders.sd3_clip, comfy.text_encoders.flux
TARGETS = {  # name: (tokenizer, model)
    "SD1": (comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel),
    "SDXL": (comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel),
    "SD3": (_sd3.SD3Tokenizer, _sd3.sd3_clip(dtype_t5=torch.float32)),
    "Flux": (_flux.FluxTokenizer, _flux.flux_clip(dtype_t5=torch.float32)),
}


def build_clip(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> comfy.sd.CLIP:
    """A new tiny CLIP on the CPU, made under inference mode as the host's loaders do."""
    target = comfy.supported_models_base.ClipTarget(*TARGETS[name])
    options = {**_SIZES, "dtype": dtype, "load_device": CPU, "offload_device": CPU}
    with torch.inference_mode():
        clip = comfy.sd.CLIP(target, model_options={**options, "initial_device": CPU})
        _fill(clip.cond_stage_model, torch.Generator().manual_seed(seed))
    return clip


def _fill(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Weights of variance 1/fan-in, norms near one, biases near zero, embeddings of deviation 1."""
    for module in model.modules():
        for name, tensor in module.named_parameters(recurse=False):
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim < 2:
                noise = 0.1 * noise + (0.0 if name == "bias" else 1.0)
            elif not isinstance(module, torch.nn.Embedding):
                noise /= tensor.shape[1] ** 0.5
            tensor.copy_(noise)
