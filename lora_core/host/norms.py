"""The norms of a MODEL and a CLIP that can be trained, and what adapters may know of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..adapters import Layer
from ..network import CLIP_PREFIX, UNET_PREFIX
from .models import ModelLayers, base_bias, base_weight, layers_by_path, weight_name

# The host's own RMS norms beside torch's: those of SD3, Flux and Llama, and that of T5.
_RMS_NORMS = ("RMSNorm", "T5LayerNorm")
_FLUX_EPSILON = 1e-6  # which Flux's norm of 0.3.75 has no attribute for (comfy/ldm/flux/layers.py)


def unet_norms(patcher: Any) -> ModelLayers:
    """Norms of a MODEL's diffusion model, by the paths of its key map."""
    return layers_by_path(patcher.model.diffusion_model, UNET_PREFIX, norm_facts)


def clip_norms(clip: Any) -> ModelLayers:
    """Norms of a CLIP's text encoders, by the paths of its key map."""
    return layers_by_path(clip.patcher.model, CLIP_PREFIX, norm_facts)


def norm_facts(module: nn.Module) -> Layer | None:
    """The Layer of a LayerNorm, GroupNorm or RMS norm with a weight of one axis, else None.

    Norms without a weight, and those of several heads at once (a weight of two axes), have none.
    """
    name = weight_name(module)
    weight = getattr(module, name) if name else None
    normalized = _normalized(module)
    if weight is None or weight.ndim != 1 or normalized is None:
        return None
    return Layer(
        shape=tuple(weight.shape),
        weight=base_weight(module),
        bias=base_bias(module),
        channel_axis=1 if isinstance(module, nn.GroupNorm) else -1,
        normalized=normalized,
    )


def _normalized(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The norm's function without weight and bias; None for a module of another kind."""
    if isinstance(module, nn.GroupNorm):
        groups, eps = module.num_groups, module.eps
        return lambda x: functional.group_norm(x, groups, eps=eps)
    if isinstance(module, nn.LayerNorm):
        size, eps = module.normalized_shape, module.eps
        return lambda x: functional.layer_norm(x, size, eps=eps)
    if isinstance(module, nn.RMSNorm) or type(module).__name__ in _RMS_NORMS:
        return _rms(getattr(module, "eps", getattr(module, "variance_epsilon", _FLUX_EPSILON)))
    return None


def _rms(eps: float | None) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.rms_norm(x, x.shape[-1:], eps=eps)
