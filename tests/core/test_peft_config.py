"""Alphas of PEFT folders and of diffusers' metadata: equal to what PEFT itself computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from lora_weave.lora_core.lora_file import KeyMap, LayerKey, LoraFile, LoraFileError
from lora_weave.lora_core.peft_config import CONFIG, METADATA, WEIGHTS

from .tolerances import assert_close

WRAP = "base_model.model."


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(6, 4)
        self.to_k = nn.Linear(6, 4)
        self.conv = nn.Conv2d(3, 4, 3)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.out = nn.Linear(4, 6)


NET = {
    name: tuple(module.weight.shape)
    for name, module in Net().named_modules()
    if isinstance(module, (nn.Linear, nn.Conv2d))
}
KEYMAP = KeyMap(
    "SD1.5",
    {
        f"diffusion_model.{name}": LayerKey(
            f"diffusion_model.{name}",
            shape,
            "lora_unet_" + name.replace(".", "_"),
            (WRAP + name, f"unet.{name}"),
        )
        for name, shape in NET.items()
    },
)
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"blocks.1.to_q": 5, "out": 2},
    "alpha_pattern": {"to_k": 7, "blocks.0.conv": 1.5, r"^blocks\.1\.to_q": 3},
}

WILDCARDS: dict[str, Any] = {
    "rank_pattern": {r"blocks\.\d+\.to_[a-z]+": 3, ".*conv": 2},
    "alpha_pattern": {r".*1.*to_q": 7, r"^blocks\.(0|[2-9]\d*)\..*(q|k)$": 1.5},
}


def wrapped(config: peft.PeftConfig) -> nn.Module:
    """A PEFT model whose adapters are random, not zero."""
    torch.manual_seed(0)
    model = peft.get_peft_model(Net(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "hada_" in name or "lokr_" in name:
            nn.init.normal_(parameter)
    return model


def expected(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix(WRAP): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def check(lora: LoraFile, wanted: dict[str, Tensor]) -> None:
    assert {path.removeprefix("diffusion_model.") for path in lora.adapters} == wanted.keys()
    for name, exact in wanted.items():
        adapter = lora.adapters[f"diffusion_model.{name}"]
        found = adapter.delta(torch.zeros(adapter.shape)).detach()
        assert_close(found, exact)


def lora_config(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": r".*(to_q|to_k|conv|out)", **options}
    )


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    "patterns", [{}, PATTERNS, WILDCARDS], ids=["plain", "patterns", "wildcards"]
)
def test_a_folder_of_peft(tmp_path: Path, rslora: bool, patterns: dict[str, Any]) -> None:
    model = wrapped(lora_config(use_rslora=rslora, **patterns))
    model.save_pretrained(tmp_path / "cat")
    for path in (tmp_path / "cat", tmp_path / "cat" / WEIGHTS):
        lora = LoraFile.read(path, KEYMAP)
        check(lora, expected(model))
        assert CONFIG not in lora.metadata
    lora.save(tmp_path / "kohya.safetensors", KEYMAP)
    check(LoraFile.read(tmp_path / "kohya.safetensors", KEYMAP), expected(model))


@pytest.mark.parametrize(
    "config",
    [
        peft.LoHaConfig(r=4, alpha=6, target_modules=["to_q", "to_k", "conv"]),
        peft.LoKrConfig(r=2, alpha=6, target_modules=["to_q", "to_k"], decompose_both=True),
        peft.LoKrConfig(r=8, alpha=6, target_modules=["to_q", "to_k", "conv", "out"]),
    ],
    ids=["loha", "lokr", "whole lokr"],
)
def test_other_types_of_peft(tmp_path: Path, config: peft.PeftConfig) -> None:
    model = wrapped(config)
    model.save_pretrained(tmp_path)
    check(LoraFile.read(tmp_path, KEYMAP), expected(model))


@pytest.mark.parametrize("rslora", [False, True])
def test_metadata_of_diffusers(tmp_path: Path, rslora: bool) -> None:
    """As its save_lora_weights writes it: the part's name before each tensor and setting."""
    config = lora_config(use_rslora=rslora, **PATTERNS)
    model = wrapped(config)
    tensors = {
        "unet." + name.removeprefix(WRAP): tensor
        for name, tensor in peft.get_peft_model_state_dict(model).items()
    }
    settings = {f"unet.{key}": value for key, value in config.to_dict().items()}
    text = json.dumps(settings, default=list)
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", {METADATA: text})
    lora = LoraFile.read(tmp_path / "x.safetensors", KEYMAP)
    check(lora, expected(model))
    assert METADATA not in lora.metadata


def tensors_of(name: str = "unet.out") -> dict[str, Tensor]:
    return {f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(6, 2)}


def read(settings: object, **more: Tensor) -> LoraFile:
    text = settings if isinstance(settings, str) else json.dumps(settings)
    return LoraFile.from_state_dict({**tensors_of(), **more}, KEYMAP, {METADATA: text})


def test_alphas_in_the_file_win() -> None:
    lora = read({"unet.r": 2, "unet.lora_alpha": 8}, **{"unet.out.alpha": torch.tensor(1.0)})
    assert lora.adapters["diffusion_model.out"].alpha == 1.0
    assert read({"unet.r": 2, "unet.lora_alpha": 8}).adapters["diffusion_model.out"].alpha == 8.0
    assert read({}).adapters["diffusion_model.out"].alpha == 2.0


def test_settings_of_other_layers_are_told() -> None:
    settings = {"transformer.r": 4, "transformer.lora_alpha": 1}
    with pytest.raises(LoraFileError, match="the alpha of transformer, but none of layers") as told:
        read(settings)
    assert len(told.value.problems) == 1 and told.value.problems[0].endswith("as unet.out")
    full = {"unet.out.diff": torch.ones(6, 4)}  # has no alpha anywhere
    lora = LoraFile.from_state_dict(full, KEYMAP, {METADATA: json.dumps(settings)})
    assert lora.adapters.keys() == {"diffusion_model.out"}


def test_what_is_left_out_keeps_its_alpha() -> None:
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    lora = read(
        {
            **{"unet.r": 2, "unet.lora_alpha": 8},
            **{"text_encoder.r": 2, "text_encoder.lora_alpha": 3},
        },
        **tensors_of(name),
    )
    assert lora.left_out[f"{name}.alpha"].item() == 3.0


@pytest.mark.parametrize(
    "settings, message",
    [
        ("{", "lora_adapter_metadata, which has its alpha, is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "is not a JSON object"),
        ("{}" + " " * 4_000_000, "its metadata lora_adapter_metadata, .* more than 4000000 bytes"),
        ({"unet.r": 0, "unet.lora_alpha": 4}, "r is 0, expected a number above 0"),
        ({"unet.r": 2}, "alpha is null, expected a number"),
        ({"unet.lora_alpha": 1}, "r is null, expected a number"),
        ({"transformer.r": 4, "transformer.lora_alpha": 1}, "alpha of transformer, but none"),
        ({"unet.r": 2, "unet.lora_alpha": "8"}, 'lora_alpha is "8"'),
        ({"unet.r": 3, "unet.lora_alpha": 8}, "unet.out has rank 2, .* says 3"),
        ({"unet.r": 2, "unet.lora_alpha": 8, "unet.alpha_pattern": [1]}, "not a table"),
        (
            {"unet.r": 2, "unet.lora_alpha": 8, "unet.alpha_pattern": {"(a+)+(b+)+": 1}},
            "is too complex",
        ),
        ({"unet.r": 2, "unet.lora_alpha": 8, "unet.rank_pattern": {"(": 1}}, "is too complex"),
        (
            {"unet.r": 2, "unet.lora_alpha": 8, "unet.init_lora_weights": "pissa_niter_4"},
            "changes the base's weights",
        ),
        (
            {"unet.r": 2, "unet.lora_alpha": 8, "unet.init_lora_weights": "lora_ga"},
            "'lora_ga', which changes the base's weights",
        ),
        (
            {"unet.r": 2, "unet.lora_alpha": 8, "unet.kasa_config": {"beta": 1e-4}},
            "kasa_config cuts the base's weights",
        ),
        ({"unet.r": 2, "unet.lora_alpha": 8, "unet.kasa_config": {}}, "kasa_config cuts"),
        (
            {"unet.r": 2, "unet.lora_alpha": 8, "unet.use_qalora": True},
            "use_qalora pools the inputs",
        ),
        (
            {"unet.r": 2, "unet.lora_alpha": 8, "unet.alora_invocation_tokens": [5, 7]},
            "alora_invocation_tokens changes only tokens",
        ),
    ],
)
def test_settings_that_can_not_be_used(settings: object, message: str) -> None:
    with pytest.raises(LoraFileError, match=message):
        read(settings)
    with pytest.raises(LoraFileError, match=message):  # nothing is loaded with another scale
        text = settings if isinstance(settings, str) else json.dumps(settings)
        LoraFile.from_state_dict(tensors_of(), KEYMAP, {METADATA: text}, strict=False)


def test_folders_that_are_not_whole(tmp_path: Path) -> None:
    folder = tmp_path / "cat"
    folder.mkdir()
    with pytest.raises(ValueError, match=f"cat: the folder has no {WEIGHTS}$"):
        LoraFile.read(folder, KEYMAP)
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="is a pickle"):
        LoraFile.read(folder, KEYMAP)
    safetensors.torch.save_file(tensors_of(WRAP + "out"), folder / WEIGHTS)
    with pytest.raises(ValueError, match=f"{CONFIG}, which has its alpha, is not beside it"):
        LoraFile.read(folder, KEYMAP)
    (folder / CONFIG).write_text("{}")
    with pytest.raises(ValueError, match="r is null"):
        LoraFile.read(folder, KEYMAP)
