"""The names under which adapters are written: the host's generic ones, or kohya's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from .adapters import Adapter
from .key_map import BIAS, KeyMap
from .lora_reading import LoraFileError, counted, some

FORMATS = ("kohya", "comfyui", "diffusers")
Format = Literal["kohya", "comfyui", "diffusers"]


def generic_names(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """All tensors under the layers' paths; a bias beside its layer's weight, as the host does."""
    return {
        f"{path.removesuffix(BIAS)}.{name}": tensor
        for path, adapter in adapters.items()
        for name, tensor in adapter.tensors().items()
    }


def kohya_names(adapters: Mapping[str, Adapter], keymap: KeyMap) -> dict[str, Tensor]:
    """All tensors under kohya's keys, norms as LyCORIS names them.

    LoraFileError for layers that `keymap` lacks.
    """
    strangers = [path for path in adapters if keymap.shape(path) is None]
    if strangers:
        line = counted(len(strangers), "layer", "are not in the model")
        raise LoraFileError("the LoRA can't be named", [f"{line}: {some(strangers)}"])
    named = {}
    for path, adapter in adapters.items():
        owner = path.removesuffix(BIAS)
        layer = keymap.at(path) or keymap.at(owner)
        assert layer is not None
        # The host reads b_norm only beside w_norm.
        is_norm = owner in keymap.norms and owner in adapters
        for name, tensor in adapter.tensors().items():
            named[f"{layer.kohya}.{_NORM_NAMES.get(name, name) if is_norm else name}"] = tensor
    return named


_NORM_NAMES = {"diff": "w_norm", "diff_b": "b_norm"}
