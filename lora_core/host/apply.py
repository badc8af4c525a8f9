"""Apply LoRAs to MODEL and CLIP through the host's ModelPatcher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comfy.weight_adapter.base import WeightAdapterBase
from torch import Tensor

from ..adapters import Adapter
from .models import CLIP_PREFIX, UNET_PREFIX, patch_key


@dataclass(frozen=True)
class Entry:
    """One LoRA of a stack: its adapters by layer path, and how strongly they apply."""

    adapters: Mapping[str, Adapter]
    strength_model: float
    strength_clip: float

    def strength(self, path: str) -> float:
        return self.strength_clip if path.startswith(CLIP_PREFIX) else self.strength_model


class StackedDelta(WeightAdapterBase):
    """All additive changes of one weight as one product: W + Σ strength · U · V.

    `weights` is a flat list: (U with the strength in it, V) of the concatenated factors, or
    (ΔW,) alone. Everything lives there, because 0.33 rebuilds adapters from `loaded_keys` and
    `weights` when it streams them.
    """

    name = "lora_weave"

    def __init__(self, loaded_keys: set[str], weights: list[Tensor]) -> None:
        self.loaded_keys = loaded_keys
        self.weights = weights

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Any,
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> Tensor:
        """W + strength · ΔW in float32, rounded once to the dtype that came in.

        Written into `weight`, which may be a slice of the host's copy of the whole weight.
        """
        parts = [part.to(weight.device, torch.float32) for part in self.weights]
        if function is not None and not _is_identity(function, weight):
            delta = parts[0] @ parts[1] if len(parts) == 2 else parts[0]
            weight += function(strength * delta.reshape(weight.shape)).to(weight.dtype)
            return weight
        flat = weight.float().reshape(weight.shape[0], -1)
        if len(parts) == 2:
            flat = torch.addmm(flat, parts[0], parts[1], alpha=strength)
        else:
            flat = torch.add(flat, parts[0].reshape(flat.shape), alpha=strength)
        return weight.copy_(flat.reshape(weight.shape))


def apply(model: Any, clip: Any, stack: Sequence[Entry]) -> tuple[Any, Any]:
    """Clones of MODEL and CLIP (each may be None) with the whole stack as one patch a weight.

    Equal to the host's own chain of LoRA loaders within rounding. An entry with strength 0
    leaves no patch. Raises ValueError naming layers that the patcher does not know.
    """
    new_model = None if model is None else model.clone()
    new_clip = None if clip is None else clip.clone()
    for patcher, prefix in ((new_model, UNET_PREFIX), (new_clip, CLIP_PREFIX)):
        if patcher is None:
            continue
        patches = stacked_patches(stack, prefix)
        known = set(patcher.add_patches(patches))
        missing = [key for key in patches if key not in known]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(patches)} layers are not in the model: "
                + ", ".join(missing[:5])
            )
    return new_model, new_clip


def stacked_patches(stack: Sequence[Entry], prefix: str) -> dict[str, StackedDelta]:
    """One StackedDelta for each weight under `prefix` that some entry changes."""
    changes: dict[str, list[tuple[float, Adapter]]] = {}
    for entry in stack:
        for path, adapter in entry.adapters.items():
            strength = entry.strength(path)
            if path.startswith(prefix) and strength != 0.0:
                changes.setdefault(path, []).append((strength, adapter))
    return {
        patch_key(path): StackedDelta({path}, _combine(changed))
        for path, changed in changes.items()
    }


@torch.no_grad()
def _combine(changes: Sequence[tuple[float, Adapter]]) -> list[Tensor]:
    """The weights of a StackedDelta: factors side by side, or one ΔW where a type has none."""
    factored = [(strength, adapter.factors(), adapter) for strength, adapter in changes]
    if all(factors is not None for _, factors, _ in factored):
        ups = [strength * factors[0].float() for strength, factors, _ in factored if factors]
        downs = [factors[1].float() for _, factors, _ in factored if factors]
        return [torch.cat(ups, dim=1).contiguous(), torch.cat(downs, dim=0).contiguous()]
    empty = [torch.zeros(adapter.shape) for _, _, adapter in factored]
    deltas = [
        s * adapter.delta(zero).float()
        for (s, _, adapter), zero in zip(factored, empty, strict=True)
    ]
    return [torch.stack(deltas).sum(dim=0)]


def _is_identity(function: Any, weight: Tensor) -> bool:
    """The host passes `lambda a: a` where a patch has no function (comfy/lora.py)."""
    return function(weight) is weight
