"""Apply LoRAs to MODEL and CLIP through the host's ModelPatcher."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from comfy.weight_adapter.base import WeightAdapterBase
from torch import Tensor, nn

from ..adapters import UNREGISTERED, Adapter, adapter_type
from ..adapters.add_change import factors_are_smaller
from ..adapters.pieces import Pieces
from ..key_map import MODULATION
from ..stack import Entry
from .models import CLIP_PREFIX, UNET_PREFIX, patch_key


class StackedDelta(WeightAdapterBase):
    """All changes of one weight, in the stack's order, in float32 and rounded once.

    `weights` is a list of steps: ("product", strengths, Us, Vs) for neighbours whose factors are
    put side by side, W += [s U ...] · [V ...]; or (type, strength, shape, names, tensors) for any
    other adapter, W += strength · ΔW(W). Everything lives there, because 0.33 rebuilds adapters
    from `loaded_keys` and `weights` when it streams them, and looks into lists and tuples only.
    """

    name = "lora_weave"

    def __init__(self, loaded_keys: set[str], weights: list[Any]) -> None:
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
        """W with all steps times `strength`, in the dtype that came in.

        Written into `weight`, which may be a slice of the host's copy of the whole weight.
        """
        changed = weight.float()
        if function is None or _is_identity(function, weight):
            for step in self.weights:
                changed = take(step, changed, strength)
            return weight if changed is weight else weight.copy_(changed)
        weight += function(change(self.weights, changed, strength)).to(weight.dtype)
        return weight


PRODUCT = "product"
# Types of steps beside the registered ones.
_OTHERS: dict[str, type[Adapter]] = {**UNREGISTERED, Pieces.name: Pieces}


@torch.no_grad()
def take(step: tuple[Any, ...], weight: Tensor, strength: float) -> Tensor:
    """The float32 weight after one step of a StackedDelta; written into `weight` where it can be.

    In place, since a pass over a large weight costs a third of the product of five rank-32 LoRAs.
    """
    if step[0] == PRODUCT:
        flat = weight.flatten(1).addmm_(*factors_of(step, weight.device), alpha=strength)
        return weight if flat.data_ptr() == weight.data_ptr() else flat.reshape(weight.shape)
    kind, own_strength, shape, names, tensors = step
    named = {
        name: tensor.to(weight.device, torch.float32)
        for name, tensor in zip(names, tensors, strict=True)
    }
    known = _OTHERS.get(kind) or adapter_type(kind)
    delta = known.from_tensors(named, shape).delta(weight).reshape(weight.shape)
    return weight.add_(delta, alpha=strength * own_strength)


def factors_of(step: tuple[Any, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """U (O, R) and V (R, I) in float32 of a "product": all its factors, side by side."""
    scales, ups, downs = step[1:]
    scaled = [up.to(device, torch.float32) * scale for scale, up in zip(scales, ups, strict=True)]
    wide = [down.to(device, torch.float32) for down in downs]
    return torch.cat(scaled, dim=1), torch.cat(wide, dim=0)


def change(steps: Sequence[tuple[Any, ...]], weight: Tensor, strength: float = 1.0) -> Tensor:
    """What all steps add to a weight, in float32."""
    changed = weight.float().clone()
    for step in steps:
        changed = take(step, changed, strength)
    return changed - weight.float()


def apply(model: Any, clip: Any, stack: Sequence[Entry]) -> tuple[Any, Any]:
    """Clones of MODEL and CLIP (each may be None) with the whole stack as one patch a weight.

    Equal to the host's own chain of LoRA loaders within rounding, but that these leave out the
    parameters of Wan's blocks. An entry with strength 0 leaves no patch. Raises ValueError naming
    layers that the patcher does not know.
    """
    new_model = None if model is None else model.clone()
    new_clip = None if clip is None else clip.clone()
    for patcher, prefix in ((new_model, UNET_PREFIX), (new_clip, CLIP_PREFIX)):
        if patcher is None:
            continue
        patches = stacked_patches(stack, prefix)
        known = set(add_parameters(patcher, patches))
        known |= set(patcher.add_patches({k: it for k, it in patches.items() if k not in known}))
        refuse_missing([key for key in patches if key not in known], len(patches))
    return new_model, new_clip


def refuse_missing(missing: Sequence[str], total: int) -> None:
    """Raises ValueError naming layers of a stack that the model does not have, if there are any."""
    if missing:
        layers = "layer" if total == 1 else "layers"
        are = "is" if len(missing) == 1 else "are"
        shown = ", ".join(missing[:5])
        raise ValueError(f"{len(missing)} of {total} {layers} {are} not in the model: {shown}")


def add_parameters(patcher: Any, patches: Mapping[str, StackedDelta]) -> list[str]:
    """Put changed parameters in the place of the model's, and give their keys.

    The host takes patches of them and then applies them to modules without children alone
    (comfy/model_patcher.py `_load_list`), which blocks are not.
    """
    keys = [key for key in patches if key.endswith(MODULATION)]
    there = {name for name, _ in patcher.model.named_parameters()} if keys else set()
    for key in there.intersection(keys):
        base = patcher.get_model_object(key)
        changed = patches[key].calculate_weight(
            base.detach().float().clone(), key, 1.0, 1.0, None, None
        )
        patcher.add_object_patch(key, nn.Parameter(changed.to(base.dtype), requires_grad=False))
    return sorted(there.intersection(keys))


def stacked_patches(stack: Sequence[Entry], prefix: str) -> dict[str, StackedDelta]:
    """One StackedDelta for each weight under `prefix` that some entry changes."""
    return {
        patch_key(path): StackedDelta(
            {path}, combine([(entry.strength(path), adapter) for entry, adapter in changed])
        )
        for path, changed in changes_by_path(stack, prefix).items()
    }


def changes_by_path(stack: Sequence[Entry], prefix: str) -> dict[str, list[tuple[Entry, Adapter]]]:
    """What changes each layer under `prefix`, in the stack's order; nothing at strength 0."""
    changes: dict[str, list[tuple[Entry, Adapter]]] = {}
    for entry in stack:
        for path, adapter in entry.adapters.items():
            if path.startswith(prefix) and entry.strength(path) != 0.0:
                changes.setdefault(path, []).append((entry, adapter))
    return changes


@torch.no_grad()
def combine(changes: Sequence[tuple[float, Adapter]]) -> list[tuple[Any, ...]]:
    """The steps of a StackedDelta: neighbours with factors of their own rank as one product."""
    steps: list[tuple[Any, ...]] = []
    for is_product, group in itertools.groupby(changes, key=lambda one: _is_product(one[1])):
        if is_product:
            steps.append(_product(list(group)))
        else:
            steps += [_step(strength, adapter) for strength, adapter in group]
    return steps


def _is_product(adapter: Adapter) -> bool:
    """Whether ΔW is no cheaper to make than by its factors: LoRA, not LoHa at rank squared.

    Nor LoKr of whole blocks, whose factors are of full rank: larger than ΔW, and kept by the patch.
    """
    rank = adapter.factored_rank
    return rank is not None and rank <= adapter.rank and factors_are_smaller(rank, adapter.shape)


def _product(changes: Sequence[tuple[float, Adapter]]) -> tuple[Any, ...]:
    """Nothing is copied here: five files of an SD1.5 would take 700 MB once more."""
    scales, ups, downs = [], [], []
    for strength, adapter in changes:
        scale, up, down = adapter.scaled_factors()
        scales.append(strength * scale)
        ups.append(up.detach())
        downs.append(down.detach())
    return PRODUCT, scales, ups, downs


def _step(strength: float, adapter: Adapter) -> tuple[Any, ...]:
    named = adapter.tensors()
    tensors = [tensor.float() for tensor in named.values()]
    return adapter.name, strength, tuple(adapter.shape), tuple(named), tensors


def _is_identity(function: Any, weight: Tensor) -> bool:
    """The host passes `lambda a: a` where a patch has no function (comfy/lora.py)."""
    return function(weight) is weight
