"""A part that was not connected is saved with the rest, in the format that is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lora_weave.lora_core.families import family_key_map
from lora_weave.lora_core.key_map import MODEL, TEXT_ENCODER, KeyMap, part_of
from lora_weave.lora_core.lora_file import LoraFile, LoraFileError
from lora_weave.lora_core.lora_model import LoraModel
from lora_weave.lora_core.peft_config import METADATA

WHOLE = family_key_map("SDXL")
MODULES = {  # as diffusers names them
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": (640, 2048),
    "text_encoder.text_model.encoder.layers.0.mlp.fc1": (3072, 768),
    "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj": (1280, 1280),
}
SETTINGS = {
    "unet": {"r": 2, "lora_alpha": 8},
    "text_encoder": {"r": 2, "lora_alpha": 6, "use_rslora": True},
    "text_encoder_2": {"r": 2, "lora_alpha": 1},
}
PREFIXES = {  # what names in a format begin with
    "kohya": ("lora_unet_", "lora_te1_", "lora_te2_"),
    "diffusers": ("unet.", "text_encoder.", "text_encoder_2."),
}


def tensors(prefix: str = "") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    named = {}
    for name, (rows, columns) in MODULES.items():
        if name.startswith(prefix):
            named[f"{name}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
            named[f"{name}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    return named


def metadata() -> dict[str, str]:
    flat = {f"{part}.{k}": value for part, its in SETTINGS.items() for k, value in its.items()}
    return {METADATA: json.dumps(flat)}


def with_only(part: str, family: str = "SDXL") -> KeyMap:
    """The key map of a model of which one part is connected."""
    layers = {path: layer for path, layer in WHOLE.layers.items() if part_of(path) == part}
    return KeyMap(family if part == MODEL else TEXT_ENCODER, layers)


def save(lora: LoraFile, keymap: KeyMap, path: Path, format: Any, *, as_model: bool) -> None:
    if as_model:
        LoraModel.from_file(lora, keymap).save(path, format=format)
    else:
        lora.save(path, keymap, format=format)


as_model = pytest.mark.parametrize("as_model", [False, True], ids=["file", "model"])


@as_model
@pytest.mark.parametrize("format", PREFIXES)
@pytest.mark.parametrize("part", [MODEL, TEXT_ENCODER])
def test_it_is_named_as_the_rest(tmp_path: Path, part: str, format: str, as_model: bool) -> None:
    keymap, path = with_only(part), tmp_path / "x.safetensors"
    lora = LoraFile.from_state_dict(tensors(), keymap, metadata())
    assert lora.left_out and len(lora.adapters) < len(MODULES)
    save(lora, keymap, path, format, as_model=as_model)
    with safetensors.safe_open(path, "pt") as file:
        keys, written = list(file.keys()), file.metadata()
    assert all(key.startswith(PREFIXES[format]) for key in keys)
    assert all(any(key.startswith(prefix) for key in keys) for prefix in PREFIXES[format])
    if format == "diffusers":  # which refuses files with both, and parts without settings
        assert not any(key.endswith(".alpha") for key in keys)
        settings = json.loads(written[METADATA])
        assert {name.partition(".")[0] for name in settings} == SETTINGS.keys()
    again = LoraFile.read(path, WHOLE)
    whole = LoraFile.from_state_dict(tensors(), WHOLE, metadata())
    assert again.adapters.keys() == whole.adapters.keys()
    for name, adapter in whole.adapters.items():
        found = again.adapters[name].tensors()
        assert all(torch.equal(found[key], t) for key, t in adapter.tensors().items())


@as_model
def test_kohyas_names_become_diffusers(tmp_path: Path, as_model: bool) -> None:
    keymap, path = with_only(MODEL), tmp_path / "x.safetensors"
    whole = LoraFile.from_state_dict(tensors(), WHOLE, metadata())
    lora = LoraFile.from_state_dict(whole.to_kohya(WHOLE), keymap)
    save(lora, keymap, path, "diffusers", as_model=as_model)
    assert safetensors.torch.load_file(path).keys() == tensors().keys()
    alphas = {name: it.alpha for name, it in LoraFile.read(path, WHOLE).adapters.items()}
    assert alphas == {name: it.alpha for name, it in whole.adapters.items()}


@as_model
@pytest.mark.parametrize("format", PREFIXES)
def test_it_is_refused_where_its_names_are_not_known(
    tmp_path: Path, format: str, as_model: bool
) -> None:
    keymap, path = with_only(MODEL, family="AuraFlow"), tmp_path / "x.safetensors"
    lora = LoraFile.from_state_dict(tensors(), keymap, metadata())
    with pytest.raises(LoraFileError) as caught:
        save(lora, keymap, path, format, as_model=as_model)
    first, second = caught.value.problems
    assert first.startswith("6 tensors are for the text encoder, which was not connected")
    assert "text_encoder.text_model.encoder.layers.0.mlp.fc1" in first
    assert first.endswith("connect a CLIP, or take the format comfyui, which keeps their names")
    assert second.startswith("the layers of AuraFlow are not known")
    assert not path.exists()
    save(lora, keymap, path, "comfyui", as_model=as_model)
    assert tensors("text_encoder").keys() <= safetensors.torch.load_file(path).keys()


@as_model
def test_what_does_not_fit_the_family_is_told(tmp_path: Path, as_model: bool) -> None:
    keymap = with_only(MODEL)
    wrong = {
        **tensors(),
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": torch.ones(2, 9),
    }
    lora = LoraFile.from_state_dict(wrong, keymap, metadata())
    with pytest.raises(LoraFileError, match=r"lora_down.weight is \(2, 9\), expected \(2, 768\)"):
        save(lora, keymap, tmp_path / "x.safetensors", "diffusers", as_model=as_model)
    assert list(tmp_path.iterdir()) == []
