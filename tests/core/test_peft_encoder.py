"""PEFT folders of a text encoder, in models that have several."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from lora_weave.lora_core.families import variant_key_map
from lora_weave.lora_core.key_map import KeyMap
from lora_weave.lora_core.lora_file import LoraFile, LoraFileError
from lora_weave.lora_core.peft_config import CONFIG, WEIGHTS

ENCODERS = [
    *(("SD1.5", "base", "clip_l"), ("SDXL", "base", "clip_l"), ("SDXL", "base", "clip_g")),
    *(("SD3", "3.5 large", encoder) for encoder in ("clip_l", "clip_g", "t5xxl")),
    *(("Flux", "dev", encoder) for encoder in ("clip_l", "t5xxl")),
]


def names_of(keymap: KeyMap, encoder: str) -> dict[str, str]:
    """{path: PEFT's name} of the first and last attention layers of a text encoder."""
    paths = [path for path in keymap.layers if path.startswith(f"text_encoders.{encoder}.")]
    chosen = [path for path in paths if path.endswith(("q_proj", "SelfAttention.q"))]
    return {
        path: f"base_model.model.{path.partition('.transformer.')[2]}"
        for path in (chosen[0], chosen[-1])
    }


def folder(at: Path, tensors: dict[str, Tensor]) -> Path:
    safetensors.torch.save_file(tensors, at / WEIGHTS)
    (at / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8}))
    return at


def pairs(keymap: KeyMap, names: dict[str, str]) -> dict[str, Tensor]:
    tensors = {}
    for path, name in names.items():
        rows, columns = keymap.layers[path].shape
        tensors[f"{name}.lora_A.weight"] = torch.ones(2, columns)
        tensors[f"{name}.lora_B.weight"] = torch.ones(rows, 2)
    return tensors


@pytest.mark.parametrize("family, variant, encoder", ENCODERS)
def test_the_sizes_tell_the_encoder(
    tmp_path: Path, family: str, variant: str, encoder: str
) -> None:
    keymap = variant_key_map(family, variant)
    names = names_of(keymap, encoder)
    lora = LoraFile.read(folder(tmp_path, pairs(keymap, names)), keymap)
    assert lora.adapters.keys() == names.keys()
    assert all(adapter.alpha == 8.0 for adapter in lora.adapters.values())


def test_sizes_that_fit_no_encoder_are_told_with_the_reason(tmp_path: Path) -> None:
    keymap = variant_key_map("SDXL", "base")
    name = "base_model.model.text_model.encoder.layers.0.self_attn.q_proj"
    tensors = {
        f"{name}.lora_A.weight": torch.ones(2, 1000),
        f"{name}.lora_B.weight": torch.ones(1000, 2),
    }
    with pytest.raises(LoraFileError, match="not tell which text encoder .* fit none") as told:
        LoraFile.read(folder(tmp_path, tensors), keymap)
    assert len(told.value.problems) == 1 and name in told.value.problems[0]


def test_without_a_clip_it_is_asked_for(tmp_path: Path) -> None:
    whole = variant_key_map("SDXL", "base")
    layers = {path: it for path, it in whole.layers.items() if path.startswith("diffusion_model.")}
    tensors = pairs(whole, names_of(whole, "clip_g"))
    with pytest.raises(LoraFileError, match="2 layers are for the text encoder; connect a CLIP"):
        LoraFile.read(folder(tmp_path, tensors), KeyMap("SDXL", layers))
