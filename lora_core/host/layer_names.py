"""What the host itself calls the layers of a live model, and its tables of diffusers' names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import comfy.lora
import comfy.model_base
import comfy.utils

from ..block_names import live_rows
from ..key_map import MODULATION, SCALE
from ..network import CLIP_PREFIX, UNET_PREFIX, Meaning, Named, Shapes, Style


def model_names(model: Any, shapes: Shapes) -> dict[str, Meaning]:
    """{name: Meaning} for what the host knows of a model's layers."""
    return dict(_meanings(comfy.lora.model_lora_keys_unet(model, {}).items(), shapes))


def encoder_names(encoders: Any, shapes: Shapes) -> dict[str, Meaning]:
    """{name: Meaning} for what the host knows of the layers of a CLIP's text encoders."""
    theirs = comfy.lora.model_lora_keys_clip(encoders, {})
    return dict(_meanings(((name, CLIP_PREFIX + key) for name, key in theirs.items()), shapes))


def diffusers_style(model: Any) -> Style:
    """Whose rules give diffusers' names of a model's layers."""
    kinds = comfy.model_base
    if isinstance(model, kinds.WAN21):
        return "wan"
    if isinstance(model, kinds.QwenImage):
        return "own"
    if isinstance(model, kinds.Lumina2) and not is_z_image(model):
        return "lumina2"
    if isinstance(model, kinds.Flux2):
        return "flux2"
    return "flux" if isinstance(model, kinds.Flux) else "table"


def is_z_image(model: Any) -> bool:
    """Whether a model of the host's class Lumina2 is a Z-Image."""
    return type(model.model_config).__name__ == "ZImage"


def diffusers_table(model: Any, shapes: Shapes) -> dict[str, Meaning]:
    """The host's own table of diffusers' names for the model's family; empty where it has none."""
    kinds, tools = comfy.model_base, comfy.utils
    table = tools.unet_to_diffusers
    for kind, other in (
        (kinds.SD3, tools.mmdit_to_diffusers),
        (kinds.Flux, tools.flux_to_diffusers),
        (kinds.Lumina2, tools.z_image_to_diffusers),
        (kinds.AuraFlow, tools.auraflow_to_diffusers),
        (kinds.PixArt, tools.pixart_to_diffusers),
    ):
        if isinstance(model, kind):
            table = other
    targets = [
        (name.removesuffix(".weight"), _within(target))
        for name, target in table(model.model_config.unet_config).items()
    ]
    return dict(_meanings(targets, shapes))


def _within(target: Any) -> Any:
    """A target of the host's tables, whose keys are those within the diffusion model."""
    if isinstance(target, str):
        return UNET_PREFIX + target
    return (UNET_PREFIX + target[0], *target[1:])


def _meanings(table: Iterable[tuple[str, Any]], shapes: Shapes) -> Iterator[Named]:
    """The host's {name: weight key, or (weight key, rows or None[, function])} as Meanings."""
    for name, target in table:
        key, rows, *function = (target, None) if isinstance(target, str) else target
        path = key.removesuffix(".weight")
        if path == key and not key.endswith((SCALE, MODULATION)):
            continue
        if path not in shapes:  # 0.3.75's table has Flux's norms as it calls them, newer ones too
            path = path.removesuffix(SCALE)
        if path not in shapes:
            continue
        if function and function[0] is not comfy.utils.swap_scale_shift:
            continue
        if rows is not None:
            rows = live_rows(path, tuple(rows), shapes[path])
        yield name, Meaning(path, rows, bool(function))
