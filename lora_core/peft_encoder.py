"""Which text encoder a PEFT folder is for: its names leave that open where a model has several."""

from __future__ import annotations

from collections.abc import Iterable

from .key_map import KeyMap, LayerKey
from .recognition import Shapes, layer_sizes

_WRAPPER = "base_model.model."
_COMPONENTS = ("text_encoder.", "text_encoder_2.", "text_encoder_3.")  # as diffusers names them


def open_names(modules: Iterable[str], keymap: KeyMap) -> list[str]:
    """Those of a folder that `keymap` has only with a text encoder's name before them."""
    return [
        name
        for name in modules
        if name.startswith(_WRAPPER)
        and keymap.find(name) is None
        and any(keymap.find(component + name) is not None for component in _COMPONENTS)
    ]


def encoders_for(shapes: Shapes, modules: Iterable[str], keymap: KeyMap) -> list[str]:
    """What may stand before `modules`: text encoders that have them all, in the sizes that a
    LoRA's {tensor name: shape} tell.
    """
    names = set(modules)
    sizes = {name: size for name, size in layer_sizes(shapes).items() if name in names}
    return [
        component
        for component in _COMPONENTS
        if all(_fits(keymap.find(component + name), size) for name, size in sizes.items())
    ]


def _fits(layer: LayerKey | None, size: tuple[int, int]) -> bool:
    """Whether (rows, columns) are the layer's, where they are told."""
    if layer is None:
        return False
    wanted = (layer.shape[0], layer.shape[1] if len(layer.shape) > 1 else 0)
    return all(told in (0, side) for told, side in zip(size, wanted, strict=True))
