"""A model's identity: equal after a restart, different for other weights or patches."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

SAMPLES = 64  # elements of each tensor that count, evenly spread, besides its name and shape


def model_identity(patcher: Any) -> str:
    """sha256 over a ModelPatcher's unpatched weights and its patches, as hex.

    Per parameter its name, shape, dtype and sampled bytes; per patch its content and strengths.
    Never a uuid, which the host draws anew at every start.
    """
    digest = hashlib.sha256()
    unpatched = {key: entry.weight for key, entry in patcher.backup.items()}
    for key, weight in sorted(patcher.model_state_dict().items()):
        _add_tensor(digest, key, unpatched.get(key, weight))
    for key in sorted(patcher.patches):
        for patch in patcher.patches[key]:
            _add(digest, key, patch)
    return digest.hexdigest()


def vae_identity(vae: Any) -> str:
    """As `model_identity`, for a VAE."""
    return model_identity(vae.patcher)


def clip_identity(clip: Any) -> str:
    """As `model_identity`, for a CLIP, with the layer that it stops at."""
    return hashlib.sha256(f"{model_identity(clip.patcher)}/{clip.layer_idx}".encode()).hexdigest()


def _add(digest: Any, name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        _add_tensor(digest, name, value)
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            _add(digest, f"{name}.{key}", value[key])
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        for index, part in enumerate(value):
            _add(digest, f"{name}.{index}", part)
    elif hasattr(value, "weights"):  # a weight adapter
        _add(digest, f"{name}.{value.name}", value.weights)
    elif isinstance(value, (str, bytes, int, float, bool, type(None))):
        digest.update(f"{name}={value!r};".encode())
    else:  # a function: its name is all that lasts over a restart
        digest.update(
            f"{name}:{getattr(value, '__qualname__', type(value).__qualname__)};".encode()
        )


def _add_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
    data = getattr(tensor, "_qdata", tensor)
    flat = data.detach().reshape(-1)
    if flat.numel():
        count = min(SAMPLES, flat.numel())
        positions = [index * (flat.numel() - 1) // max(count - 1, 1) for index in range(count)]
        picked = flat[torch.tensor(positions, device=flat.device)].cpu()
        digest.update(picked.view(torch.uint8).numpy().tobytes())
