"""Tensors of a part that was not connected when they were read, with the names of its family."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .adapters import Adapter
from .families import family_key_map, key_map_for
from .key_map import MODEL, TEXT_ENCODER, KeyMap
from .lora_reading import LoraFileError, Reading, counted, some


def adapters_left_out(
    tensors: Mapping[str, Tensor], keymap: KeyMap, metadata: Mapping[str, str]
) -> tuple[dict[str, Adapter], KeyMap]:
    """The adapters in `LoraFile.left_out`, and a key map that has names for them.

    `keymap` is the one that lacks their part. Text encoders are those of its family; a diffusion
    model is that of the family which the tensors tell. Raises LoraFileError where the family's
    layers are not known, and with everything that does not fit them.
    """
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    part = TEXT_ENCODER if MODEL in keymap.parts else MODEL
    try:
        if part == TEXT_ENCODER:
            familys = family_key_map(keymap.family, shapes)
        else:
            familys = key_map_for(shapes, metadata)
        with torch.inference_mode(False), torch.no_grad():
            reading = Reading(tensors, familys, {})
        problems = reading.problems
    except ValueError as error:
        problems = [str(error)]
    if problems:
        wanted = "CLIP" if part == TEXT_ENCODER else "MODEL"
        what = f"are for the {part}, which was not connected, and can't be renamed"
        line = f"{counted(len(tensors), 'tensor', what)}: {some(list(tensors))}; connect a {wanted}"
        problems = [f"{line}, or take the format comfyui, which keeps their names", *problems]
        raise LoraFileError("the LoRA can't be named", problems)
    return reading.adapters, familys
