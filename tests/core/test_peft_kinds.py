"""(IA)³ and OFT that PEFT saved: weights and biases are those that PEFT itself merges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from lora_weave.lora_core.adapters import BiasGain
from lora_weave.lora_core.adapters.create_options import CreateOptions
from lora_weave.lora_core.adapters.ia3 import IA3
from lora_weave.lora_core.adapters.oft_input import InputOFT
from lora_weave.lora_core.key_map import BIAS
from lora_weave.lora_core.lora_file import KeyMap, LayerKey, LoraFile, LoraFileError
from lora_weave.lora_core.peft_config import CONFIG, WEIGHTS

from .tolerances import assert_close

WRAP = "base_model.model."
STRENGTHS = (0.0, 0.5, 1.0, 2.0, -1.0)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(6, 4)
        self.to_k = nn.Linear(6, 6)  # square: its rows and columns are equal in number
        self.conv = nn.Conv2d(4, 6, 3, bias=False)
        self.point = nn.Conv2d(6, 6, 1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.out = nn.Linear(12, 6)


def net() -> Net:
    torch.manual_seed(0)
    return Net().requires_grad_(False)


def layers() -> dict[str, nn.Module]:
    return {n: m for n, m in net().named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


def layer_key(name: str, module: nn.Module) -> LayerKey:
    path, kohya = f"diffusion_model.{name}", "lora_unet_" + name.replace(".", "_")
    aliases = (WRAP + name, f"unet.{name}")
    shape = tuple(module.weight.shape)
    return LayerKey(path, shape, kohya, aliases, diffusers=(f"unet.{name}",))


KEYMAP = KeyMap(
    "SD1.5",
    {f"diffusion_model.{name}": layer_key(name, module) for name, module in layers().items()},
    biases=frozenset(f"diffusion_model.{n}" for n, m in layers().items() if m.bias is not None),
)
TARGETS = ["to_q", "to_k", "conv", "point", "out"]
OFT_CONFIGS: dict[str, dict[str, Any]] = {
    "exact": {"oft_block_size": 2, "use_cayley_neumann": False},
    "series": {"oft_block_size": 3},
    "series of 2": {"oft_block_size": 2, "num_cayley_neumann_terms": 2},
    "series of 3": {"oft_block_size": 6, "num_cayley_neumann_terms": 3},
    "series of 7": {"oft_block_size": 6, "num_cayley_neumann_terms": 7},
    "shared": {"oft_block_size": 2, "block_share": True, "use_cayley_neumann": False},
    "by number": {"oft_block_size": 0, "r": 2},
    "one block": {"oft_block_size": 0, "r": 1},
    "constrained": {"oft_block_size": 2, "coft": True, "eps": 0.3},
}


def saved(folder: Path, config: peft.PeftConfig) -> nn.Module:
    """A folder as PEFT writes it, of random numbers; the model that PEFT has merged it into."""
    model = peft.get_peft_model(net(), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if any(word in name for word in ("oft_R", "ia3_l", "hada_")):
            middle = 1.0 if "ia3_l" in name else 0.0
            parameter.data.normal_(middle, 0.2, generator=generator)
    model.save_pretrained(str(folder))
    return model.merge_and_unload()


def assert_changed_as(lora: LoraFile, merged: nn.Module) -> None:
    """W + ΔW and b + Δb are the merged model's, for every layer, and W + s · ΔW lies on the way."""
    for name, module in layers().items():
        theirs = merged.get_submodule(name)
        path = f"diffusion_model.{name}"
        for tensor, expected, where in (
            (module.weight, theirs.weight, path),
            (module.bias, theirs.bias, path + BIAS),
        ):
            if where not in lora.adapters:
                assert tensor is None or torch.equal(tensor, expected), where
                continue
            change = lora.adapters[where].delta(tensor).detach()
            for strength in STRENGTHS:
                wanted = tensor + strength * (expected - tensor)
                assert_close(tensor + strength * change, wanted)


@pytest.mark.filterwarnings("ignore:Invalid")
@pytest.mark.parametrize("config", OFT_CONFIGS.values(), ids=OFT_CONFIGS)
def test_oft(tmp_path: Path, config: dict[str, Any]) -> None:
    """Of linear layers and convolutions, each block size adjusted to the layer as PEFT does."""
    merged = saved(tmp_path, peft.OFTConfig(target_modules=TARGETS, **config))
    lora = LoraFile.read(tmp_path, KEYMAP)
    assert lora.adapters.keys() == KEYMAP.layers.keys()
    assert all(isinstance(adapter, InputOFT) for adapter in lora.adapters.values())
    assert_changed_as(lora, merged)
    for format in ("kohya", "comfyui", "diffusers"):  # none of which has PEFT's settings
        lora.save(tmp_path / "x.safetensors", KEYMAP, format=format)
        assert_changed_as(LoraFile.read(tmp_path / "x.safetensors", KEYMAP), merged)


FEEDFORWARD: dict[str, Any] = {
    "none": [],
    "names": ["to_k", "point"],
    "one layer": ["blocks.1.conv", "out", "blocks.0.to_q"],
    "pattern": r".*(point|conv)|blocks\.1\.to_k",
    "all": ".*",
}


@pytest.mark.parametrize("modules", FEEDFORWARD.values(), ids=FEEDFORWARD)
def test_ia3(tmp_path: Path, modules: Any) -> None:
    """On outputs, with their bias, and on the inputs of `feedforward_modules`."""
    config = peft.IA3Config(target_modules=r".*(to_q|to_k|conv|point|out)")
    config.feedforward_modules = modules  # behind its check, which wants the same words twice
    merged = saved(tmp_path, config)
    lora = LoraFile.read(tmp_path, KEYMAP)
    weights = {path: it for path, it in lora.adapters.items() if not path.endswith(BIAS)}
    assert weights.keys() == KEYMAP.layers.keys()
    for path, adapter in weights.items():
        assert isinstance(adapter, IA3)
        has_gain = isinstance(lora.adapters.get(path + BIAS), BiasGain)
        assert has_gain == (path in KEYMAP.biases and not adapter.on_input)
    assert_changed_as(lora, merged)
    for format in ("kohya", "comfyui", "diffusers"):
        lora.save(tmp_path / "x.safetensors", KEYMAP, format=format)
        assert_changed_as(LoraFile.read(tmp_path / "x.safetensors", KEYMAP), merged)


@pytest.mark.parametrize(
    "config",
    [peft.OFTConfig(target_modules=["out"]), peft.IA3Config(target_modules=["out"])],
    ids=["oft", "ia3"],
)
def test_names_of_a_live_model(config: peft.PeftConfig, tmp_path: Path) -> None:
    """`.default` in a name, as in a dict of the model's own tensors."""
    if isinstance(config, peft.IA3Config):
        config.feedforward_modules = []
    model = peft.get_peft_model(net(), config)
    named = {n: t for n, t in model.state_dict().items() if "default" in n}
    assert len(named) == 1 and "base_model.model.out." in next(iter(named))
    terms = {f"{WRAP}out.oft_R.terms": torch.tensor(0)}
    lora = LoraFile.from_state_dict({**named, **(terms if "oft" in str(named) else {})}, KEYMAP)
    assert "diffusion_model.out" in lora.adapters


# Written again


def folder_round_trip(tmp_path: Path, config: peft.PeftConfig) -> None:
    """PEFT's folder, read and written: PEFT merges it as before, and we read the same bits."""
    merged = saved(tmp_path / "theirs", config)
    lora = LoraFile.read(tmp_path / "theirs", KEYMAP)
    lora.save_peft(tmp_path / "ours", KEYMAP)
    theirs, ours = (
        safetensors.torch.load_file(tmp_path / folder / WEIGHTS) for folder in ("theirs", "ours")
    )
    assert theirs.keys() == ours.keys()
    again = peft.PeftModel.from_pretrained(net(), str(tmp_path / "ours")).merge_and_unload()
    for name, parameter in merged.named_parameters():
        assert_close(again.get_parameter(name), parameter)
    second = LoraFile.read(tmp_path / "ours", KEYMAP)
    for path, adapter in lora.adapters.items():
        found, expected = second.adapters[path].tensors(), adapter.tensors()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[n], tensor) for n, tensor in expected.items()), path


@pytest.mark.filterwarnings("ignore:Invalid")
@pytest.mark.parametrize("config", OFT_CONFIGS.values(), ids=OFT_CONFIGS)
def test_oft_is_written_as_a_folder(tmp_path: Path, config: dict[str, Any]) -> None:
    folder_round_trip(tmp_path, peft.OFTConfig(target_modules=TARGETS, **config))


@pytest.mark.parametrize("modules", FEEDFORWARD.values(), ids=FEEDFORWARD)
def test_ia3_is_written_as_a_folder(tmp_path: Path, modules: Any) -> None:
    config = peft.IA3Config(target_modules=r".*(to_q|to_k|conv|point|out)")
    config.feedforward_modules = modules
    folder_round_trip(tmp_path, config)


@pytest.mark.parametrize("tucker", [False, True])
def test_loha_is_written_as_a_folder(tmp_path: Path, tucker: bool) -> None:
    """Of several ranks and alphas."""
    config = peft.LoHaConfig(
        r=2, alpha=3, target_modules=TARGETS, use_effective_conv2d=tucker,
        rank_pattern={"to_k": 4}, alpha_pattern={"blocks.1.point": 1.5},
    )  # fmt: skip
    folder_round_trip(tmp_path, config)


def ia3(path: str, **options: bool) -> IA3:
    made = IA3.create(KEYMAP.layers[path].shape, 1, 1.0, options=CreateOptions(**options))
    made.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    return made


def test_ia3_that_leaves_biases_is_not_peft_s(tmp_path: Path) -> None:
    """LyCORIS' (IA)³ changes the weight alone."""
    out, conv = "diffusion_model.out", "diffusion_model.blocks.0.conv"
    with pytest.raises(
        LoraFileError, match="scales the layer's bias, too, .*: diffusion_model.out"
    ):
        LoraFile({out: ia3(out)}).save_peft(tmp_path, KEYMAP)
    assert list(tmp_path.iterdir()) == []
    for adapters in ({out: ia3(out, on_input=True)}, {conv: ia3(conv)}):
        LoraFile(adapters).save_peft(tmp_path, KEYMAP)
        assert LoraFile.read(tmp_path, KEYMAP).adapters.keys() == adapters.keys()
    gain = BiasGain(torch.ones(6))
    with pytest.raises(LoraFileError, match="no changes of biases alone: diffusion_model.out.bias"):
        LoraFile({conv: ia3(conv), out + BIAS: gain}).save_peft(tmp_path, KEYMAP)


def test_oft_of_several_sizes_is_not_peft_s(tmp_path: Path) -> None:
    out, conv = "diffusion_model.out", "diffusion_model.blocks.0.conv"
    made = {path: InputOFT.create(KEYMAP.layers[path].shape, 4, 1.0) for path in (out, conv)}
    LoraFile(made).save_peft(tmp_path / "one", KEYMAP)
    made[conv] = InputOFT.create((6, 4, 3, 3), 6, 1.0)
    made[out] = InputOFT.create((6, 12), 3, 1.0)
    with pytest.raises(LoraFileError, match=r"here are sizes \[3, 6\], numbers \[4, 6\]"):
        LoraFile(made).save_peft(tmp_path / "two", KEYMAP)


# What can't be read


def files_of(folder: Path, tensors: dict[str, Tensor], settings: dict[str, object]) -> Path:
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(settings))
    return folder


OFT = {"peft_type": "OFT", "use_cayley_neumann": True, "num_cayley_neumann_terms": 5}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_cayley_neumann": None}, "use_cayley_neumann is null, expected true or false"),
        ({"num_cayley_neumann_terms": 1}, "num_cayley_neumann_terms is 1, expected .* 2 to 100"),
        ({"num_cayley_neumann_terms": 10**9}, "num_cayley_neumann_terms is 1000000000"),
        ({"num_cayley_neumann_terms": True}, "num_cayley_neumann_terms is true"),
        ({"coft": True}, "eps is null, expected a number above 0"),
        ({"coft": True, "eps": -1}, "eps is -1"),
        ({"peft_type": "BOFT"}, "peft_type is 'BOFT'; LORA, LOHA, LOKR, IA3, OFT can be read"),
        ({"peft_type": "IA3", "feedforward_modules": "(a+)+b"}, "is too complex"),
        ({"peft_type": "IA3", "feedforward_modules": 3}, "feedforward_modules is 3, expected"),
        ({"peft_type": "IA3", "feedforward_modules": [3]}, "has entries that are no names"),
    ],
)
def test_settings_that_can_not_be_read(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    folder = files_of(tmp_path, {f"{WRAP}out.oft_R.weight": torch.ones(6, 1)}, {**OFT, **changes})
    with pytest.raises(LoraFileError, match=message):
        LoraFile.read(folder, KEYMAP)


def read(ending: str, tensor: Tensor, name: str = "unet.out", **more: Tensor) -> LoraFile:
    tensors = {f"{name}.{ending}": tensor, **{f"{name}.{n}": t for n, t in more.items()}}
    return LoraFile.from_state_dict(tensors, KEYMAP)


def test_oft_without_its_settings() -> None:
    with pytest.raises(LoraFileError, match="PEFT keeps that in adapter_config.json"):
        read("oft_R.weight", torch.ones(6, 1))


@pytest.mark.parametrize(
    "values, terms, message",
    [
        ((5, 1), 0, r"oft_R.weight is \(5, 1\), expected .* N · B = 12, or N = 1"),
        ((6, 2), 0, r"oft_R.weight is \(6, 2\)"),
        ((1, 10), 0, r"oft_R.weight is \(1, 10\)"),
        ((6,), 0, r"oft_R.weight is \(6,\)"),
        ((6, 1), 1, "oft_R.terms is 1, expected 0 or 2 to 100"),
        ((6, 1), 101, "oft_R.terms is 101"),
    ],
)
def test_oft_of_another_layer(values: tuple[int, ...], terms: int, message: str) -> None:
    with pytest.raises(LoraFileError, match=message):
        read("oft_R.weight", torch.ones(values), **{"oft_R.terms": torch.tensor(terms)})


def test_what_does_not_go_with_oft() -> None:
    with pytest.raises(LoraFileError, match="oft_blocks does not go with oft_R.weight"):
        read(
            "oft_R.weight",
            torch.ones(6, 1),
            **{"oft_R.terms": torch.tensor(0), "oft_blocks": torch.zeros(3, 2, 2)},
        )


def test_the_side_of_ia3_without_its_settings() -> None:
    """By the shape, where outputs and inputs differ in it."""
    for shape, on_input in (((6, 1), False), ((1, 12), True)):
        adapter = read("ia3_l", torch.full(shape, 1.5)).adapters["diffusion_model.out"]
        assert isinstance(adapter, IA3) and adapter.on_input is on_input
        assert torch.equal(adapter.weight, torch.full((max(shape),), 0.5))
    with pytest.raises(LoraFileError, match="may be of outputs or inputs: PEFT's adapter_config"):
        read("ia3_l", torch.ones(1, 6, 1, 1), "unet.blocks.0.point")
    with pytest.raises(LoraFileError, match=r"ia3_l is \(7, 1\), expected \(6, 1\) or \(1, 12\)"):
        read("ia3_l", torch.ones(7, 1))
    with pytest.raises(LoraFileError, match="weight and ia3_l are both there"):
        read("ia3_l", torch.ones(6, 1), weight=torch.ones(6))
    with pytest.raises(LoraFileError, match="diff_b and ia3_b are both there"):
        read("ia3_l", torch.ones(6, 1), diff_b=torch.ones(6))
