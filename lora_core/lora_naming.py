"""The names under which adapters are written: the host's generic ones, or kohya's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from .adapters import Adapter
from .adapters.pieces import Pieces
from .key_map import BIAS, KeyMap
from .lora_reading import LoraFileError, counted, some

FORMATS = ("kohya", "comfyui", "diffusers")
Format = Literal["kohya", "comfyui", "diffusers"]


def generic_names(
    adapters: Mapping[str, Adapter], keymap: KeyMap | None = None
) -> dict[str, Tensor]:
    """All tensors under the layers' paths; a bias beside its layer's weight, as the host does.

    `Pieces` go under `keymap`'s names of their rows. LoraFileError where it has none.
    """
    whole, parts = _apart(adapters, keymap)
    by_module = [(path.removesuffix(BIAS), adapter) for path, adapter in whole.items()]
    return {
        f"{module}.{name}": tensor
        for module, adapter in [*by_module, *parts.items()]
        for name, tensor in adapter.tensors().items()
    }


def kohya_names(adapters: Mapping[str, Adapter], keymap: KeyMap) -> dict[str, Tensor]:
    """All tensors under kohya's keys, norms as LyCORIS names them.

    `Pieces` go under the names of their rows: sd-scripts know none, so these are the host's.
    LoraFileError for layers that `keymap` lacks, and rows that it has no name for.
    """
    strangers = [path for path in adapters if keymap.shape(path) is None]
    if strangers:
        line = counted(len(strangers), "layer", "are not in the model")
        raise LoraFileError("the LoRA can't be named", [f"{line}: {some(strangers)}"])
    whole, parts = _apart(adapters, keymap)
    named = {
        f"{module}.{name}": tensor
        for module, adapter in parts.items()
        for name, tensor in adapter.tensors().items()
    }
    for path, adapter in whole.items():
        owner = path.removesuffix(BIAS)
        layer = keymap.at(path) or keymap.at(owner)
        assert layer is not None
        # The host reads b_norm only beside w_norm.
        is_norm = owner in keymap.norms and owner in adapters
        for name, tensor in adapter.tensors().items():
            named[f"{layer.kohya}.{_NORM_NAMES.get(name, name) if is_norm else name}"] = tensor
    return named


def _apart(
    adapters: Mapping[str, Adapter], keymap: KeyMap | None
) -> tuple[dict[str, Adapter], dict[str, Adapter]]:
    """Those of whole layers by path, and those of some rows by the names of the rows."""
    whole: dict[str, Adapter] = {}
    parts: dict[str, Adapter] = {}
    problems = []
    for path, adapter in adapters.items():
        if not isinstance(adapter, Pieces):
            whole[path] = adapter
            continue
        layer = None if keymap is None else keymap.at(path)
        for place, one in adapter.placed():
            name = None if layer is None else layer.name_of_rows(place.start, place.stop)
            if name is not None:
                parts[name] = one
            else:
                problems.append(
                    f"{path}: the {one.name} of the rows {place.start} to {place.stop} can be"
                    " written under the name of these rows alone, which is not known without the"
                    " key map of its model"
                )
    if problems:
        raise LoraFileError("the LoRA can't be named", problems)
    return whole, parts


_NORM_NAMES = {"diff": "w_norm", "diff_b": "b_norm"}
